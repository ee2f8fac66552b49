// Softmax attention of some query rows over the keys and values of one head.
#pragma once

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

void attend(const float* q, size_t ldq, size_t Q, const Visible* visible, const HeadRows& rows, float* out, size_t ldo);

}  // namespace GEMMA_ISA
}  // namespace gemma
