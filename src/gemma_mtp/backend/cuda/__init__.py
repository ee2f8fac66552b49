"""Triton kernels for one NVIDIA GPU, and the backend over them (docs/explain/gpu.md).

Rules that every kernel keeps, so that a row's bits depend on the tokens up to it alone:
R1 a dot product over K is cut into parts that follow from (N, K) alone; a part is one chain of tensor-core steps from
   zero, ascending; parts are added in order, in float32. Tile, warps and instruction are free.
R2 no atomics on floats, no sum whose order depends on timing, no autotuning, no library's product.
R3 no multiply-add is fused but where `tl.fma` is written.
R4 `tl.sum` only in programs of one row, with a block and warps that follow from the row's size.
R5 attention runs in spans of 256 positions that begin at multiples of 256, blocks of 32 ascending in each, and spans
   are joined in order. What a row does not see adds nothing.
R6 choices are order-free: the largest, the lowest id among equals.
R7 a row's experts are summed in the order of its own choice.
R8 padding rows load zeros and store nothing.
"""
