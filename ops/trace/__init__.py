"""Traces: every op call of a run with checksums, chosen ones with their tensors, to be judged and run again on any machine."""

from ops.trace.call import Call, Link, place_order
from ops.trace.reader import Trace, TraceError
from ops.trace.record import NOTHING, Recorder, Selection
from ops.trace.verdict import Finding, changed, finding, judge_again, judge_recorded
from ops.trace.writer import Writer

__all__ = ["NOTHING", "Call", "Finding", "Link", "Recorder", "Selection", "Trace", "TraceError", "Writer"]
__all__ += ["changed", "finding", "judge_again", "judge_recorded", "place_order"]
