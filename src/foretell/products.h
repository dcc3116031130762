// What streamed.cpp multiplies for the others.

#pragma once

// out (rows, d_out) = x (rows, d_in) W^T + bias, in float32, for a weight as foretell_product takes it. The rows are
// rounded to bfloat16 where the processor multiplies those faster.
void foretell_rough_product(const float* x, long rows, long d_in, const void* weight, const float* bias, float* out,
                            long d_out);
