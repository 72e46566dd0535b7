// The activation functions, for whoever applies them: ACTIVATION is SILU, GELU, GELU_TANH or CLAMPED.
#pragma once
#include "ptx.cuh"

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define CLAMPED 3  // of GPT-OSS, arXiv:2508.10925
// x / (1 + e^-y); to within some units of the last place, of which the operands that leave keep 8 of 24 bits
DEVICE float over_logistic(float x, float y) { return quotient(x, 1.f + power_of_2(y * -1.4426950408889634f)); }
DEVICE float act(float x) {
#if ACTIVATION == SILU
  return over_logistic(x, x);
#elif ACTIVATION == GELU
  return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
#else
  return over_logistic(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
#endif
}
DEVICE float gated(float gate, float up) {
#if ACTIVATION == CLAMPED
  gate = gate > 7.f ? 7.f : gate;  // a NaN stays one
  up = up > 7.f ? 7.f : up < -7.f ? -7.f : up;
  return over_logistic(gate, 1.702f * gate) * (up + 1.f);
#else
  return act(gate) * up;
#endif
}
