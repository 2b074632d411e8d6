// One token from the result of attention to the end of a layer with experts, in one launch: the output product and its
// residual, RMSNorm, router and choice, the chosen experts' gate and up, and their way down with weights and residual.
//
// At one token every weight is read once and nothing is computed twice, so a layer is the time of its bytes plus what
// passes between them. Four kernels and an addition begin and end five times, 3 us each; here blocks stay, one on each
// multiprocessor, and wait for one another three times (grid.cuh), while the copies of what comes next go on
// (row_pairs.cuh): the router's rows come with those of the output product, and those of the way down with the end of
// gate and up. Only while the experts are chosen is there nothing to copy.
//
// Macros: those of moe_token.cuh; with ATTENDED = 0 x is the residual stream after attention.
#include "moe_token.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_token(
    const u16* __restrict__ x,         // [WIDTH], the residual stream
    const u16* __restrict__ attended,  // [ATTENDED]
    const u16* __restrict__ output,    // [WIDTH, ATTENDED]
    const float* __restrict__ norm,    // [WIDTH]
    const u16* __restrict__ router,    // [EXPERTS, WIDTH]
    const float* __restrict__ bias,    // [EXPERTS]
    const u16* __restrict__ gate_up,   // [EXPERTS, 2 FFN, WIDTH]
    const u16* __restrict__ down,      // [EXPERTS, WIDTH, FFN]
    const int*,                        // `words`, which begin as zeros
    u16* out,                          // [WIDTH], the residual stream after the layer
    u16* between,                      // [WIDTH], the same after attention
    float* logits,                     // [EXPERTS]
    u16* hidden,                       // [CHOSEN, FFN]
    int* words                         // [BLOCKS], of the barrier
) {
  DYNAMIC_SHARED(shared);
  const Output first = {output};
  const Route second = {router};
  Ring<Output, Route> ring(first, second, shared);
  const NormWeight weight(norm);
  const u16* stream = x;
  if (ATTENDED) {
    uint4* const inputs = (uint4*)(shared + INPUTS_AT);
    fetch_inputs<ATTENDED>(inputs, attended);
    auto one = [](int) { return 1.f; };
    auto before = [&](int item) { return __ldcg((const u32*)x + item); };
    multiply(first, ring, inputs, one, before, [&](int item, float a, float b, u32 known) {
      add_to_stream(between, item, a, b, known);
    });
    grid_sync(words, 1, BLOCKS, THREADS);
    stream = between;
  }
  through_experts(shared, ring, second, stream, weight, bias, gate_up, down, out, logits, hidden, words, 1, {});
}
