// Work shared with a few helper threads, piece by piece: a helper that the system keeps off its core costs its share of the
// speed, not the wait for a barrier. Between the kernels of a step helpers spin, so that starting one costs well below 1 us.
#pragma once

namespace v4 {

using Piece = void (*)(const void* data, long piece);

// Calls piece(data, i) for every i in 0..pieces-1, each exactly once, on the caller and on up to threads - 1 helpers; returns
// when all are done. A second caller at the same time works alone.
void share(int threads, long pieces, Piece piece, const void* data);

template <class Body>
void spread(int threads, long pieces, const Body& body) {
  if (threads < 2 || pieces < 2) {
    for (long i = 0; i < pieces; ++i) body(i);
    return;
  }
  share(threads, pieces, [](const void* data, long i) { (*static_cast<const Body*>(data))(i); }, &body);
}

// Floats of weights in a piece: long enough to hide its start, short enough that nobody waits long for the last one.
constexpr long kPiece = 1 << 14;

// body(first, end) over rows 0..rows-1 of `width` floats of weights each
template <class Body>
void spread_rows(int threads, long rows, long width, const Body& body) {
  const long per = width < kPiece ? kPiece / (width > 0 ? width : 1) : 1;
  spread(threads, (rows + per - 1) / per, [&](long i) { body(i * per, (i + 1) * per < rows ? (i + 1) * per : rows); });
}

}  // namespace v4
