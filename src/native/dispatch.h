// Instruction sets: which there are, and which one this machine runs.
#pragma once

#include "kernels/kernels.h"

namespace gemma {

constexpr const char* ISAS[] = {"amx", "avx512_bf16", "avx512", "avx2", "neon", "portable"};  // the best first

// Returns the kernels of an instruction set, or null where this machine lacks it.
const Kernels* kernels_named(const char* name);
// Returns the kernels in use: those that the environment's GEMMA_MTP_ISA names, else the best of this machine.
const Kernels& kernels();

}  // namespace gemma
