"""A test instrument: an NPU that is not there, pretended on a CPU, so that the ascend backend's own lines run anywhere.

Level l2 puts models of the vendor's ops behind their schemas, on CPU tensors. Level l3 keeps tensors on device "npu" and runs the real host
code of the installed torch_npu on stand-ins for CANN's libraries; behind each kernel launch stands the same model. What a run proves and what
it does not: docs/ascend.md. Nothing here is ever imported by a backend.
"""
