"""The sources of the custom kernels, in CUDA C++. NVRTC compiles them when the runner starts, hence no includes.

In most, a thread handles vectors of 16 bytes: 8 channels in half precision, of maps that are channels-last. Counts of
vectors refer to these. The same text compiles for CPUs, where tests run it.
"""

HALVES = r"""
#ifndef ON_HOST
__device__ __forceinline__ float widened(unsigned short half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
__device__ __forceinline__ unsigned short narrowed(float x) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
#endif
union Halves {
    uint4 vector;
    unsigned short each[8];
};
"""

# NaN stays NaN, as with torch's own ReLU.
_BIAS_RELU = r"""
extern "C" __global__ void bias_relu(uint4* map, const uint4* bias, int n_vectors, int vectors_per_pixel) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_vectors) return;
    Halves x, b;
    x.vector = map[i];
    b.vector = bias[i % (unsigned)vectors_per_pixel];
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float sum = widened(x.each[k]) + widened(b.each[k]);
        x.each[k] = narrowed(sum < 0.0f ? 0.0f : sum);
    }
    map[i] = x.vector;
}
"""

_CONCAT = r"""
extern "C" __global__ void concat(
    uint4* out, const uint4* a, const uint4* b, const uint4* c, int n_a, int n_b, int n_c, int n_pixels, int out_stride
) {
    unsigned n = n_a + n_b + n_c, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_pixels) return;
    unsigned pixel = i / n;
    int at = i - pixel * n;
    uint4* here = out + (long long)pixel * out_stride + at;
    if (at < n_a) *here = a[pixel * n_a + at];
    else if (at < n_a + n_b) *here = b[pixel * n_b + at - n_a];
    else *here = c[pixel * n_c + at - n_a - n_b];
}
"""

_MOVE = r"""
// A store is contiguous. Rows have `each` vectors per pixel, and `apart` from one pixel to the next.
__device__ __forceinline__ void move_one(
    uint4* store, uint4* rows, long long slot, int row, int n, int at, int out, int each, int apart
) {
    uint4* stored = store + slot * n + at;
    unsigned pixel = at / (unsigned)each;
    uint4* loose = rows + ((long long)row * (n / each) + pixel) * apart + (at - pixel * each);
    if (out) *loose = *stored;
    else *stored = *loose;
}
extern "C" __global__ void move(
    const long long* slots, int n_rows, int out, uint4* store_a, uint4* rows_a, int n_a, int each_a, int apart_a,
    uint4* store_b, uint4* rows_b, int n_b, int each_b, int apart_b, uint4* store_c, uint4* rows_c, int n_c, int each_c,
    int apart_c, uint4* store_d, uint4* rows_d, int n_d, int each_d, int apart_d
) {
    unsigned n = n_a + n_b + n_c + n_d, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_rows) return;
    unsigned row = i / n;
    int at = i - row * n;
    long long slot = slots[row];
    if (at < n_a) return move_one(store_a, rows_a, slot, row, n_a, at, out, each_a, apart_a);
    at -= n_a;
    if (at < n_b) return move_one(store_b, rows_b, slot, row, n_b, at, out, each_b, apart_b);
    at -= n_b;
    if (at < n_c) return move_one(store_c, rows_c, slot, row, n_c, at, out, each_c, apart_c);
    move_one(store_d, rows_d, slot, row, n_d, at - n_c, out, each_d, apart_d);
}
"""

_MAX_POOL = r"""
extern "C" __global__ void max_pool(
    uint4* out, const uint4* map, int n_vectors, int height, int width, int out_height, int out_width,
    int vectors_per_pixel, int size, int stride, int padding
) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_vectors) return;
    unsigned at = i % (unsigned)vectors_per_pixel, pixel = i / (unsigned)vectors_per_pixel;
    int column = pixel % (unsigned)out_width, line = pixel / (unsigned)out_width;
    int row = line / out_height;
    int top = (line - row * out_height) * stride - padding, left = column * stride - padding;
    float best[8];
#pragma unroll
    for (int k = 0; k < 8; k++) best[k] = widened(0xFC00);  // -inf
    for (int y = top < 0 ? 0 : top; y < top + size && y < height; y++)
        for (int x = left < 0 ? 0 : left; x < left + size && x < width; x++) {
            Halves here;
            here.vector = map[((unsigned)(row * height + y) * width + x) * vectors_per_pixel + at];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                float value = widened(here.each[k]);
                if (value > best[k] || value != value) best[k] = value;
            }
        }
    Halves found;
#pragma unroll
    for (int k = 0; k < 8; k++) found.each[k] = narrowed(best[k]);
    out[i] = found.vector;
}
"""

# Each thread turns four pixels, twelve bytes, into two vectors (one copy) or four (two copies).
_CENTRE = r"""
extern "C" __global__ void centre(
    uint4* out, const unsigned* images, const float* levels, int n_quarters, int n_copies
) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_quarters) return;
    unsigned words[3] = {images[3 * i], images[3 * i + 1], images[3 * i + 2]};
    Halves pixels[4];
#pragma unroll
    for (int k = 0; k < 12; k++) {
        float value = (float)((words[k / 4] >> (8 * (k % 4))) & 255u);
        pixels[k / 3].each[k % 3] = narrowed((value - levels[k % 3]) * 0.015625f);
    }
#pragma unroll
    for (int p = 0; p < 4; p++) {
        pixels[p].each[3] = narrowed(1.0f);
        pixels[p].vector.z = pixels[p].vector.x;
        pixels[p].vector.w = pixels[p].vector.y;
        if (n_copies == 2) out[4 * i + p] = pixels[p].vector;
        else if (p % 2) {
            pixels[p - 1].vector.z = pixels[p].vector.x;
            pixels[p - 1].vector.w = pixels[p].vector.y;
            out[2 * i + p / 2] = pixels[p - 1].vector;
        }
    }
}
"""

# One warp per row, with the arithmetic of `scoring.judge_by_torch`. As there, NaN leads all numbers.
_JUDGE = r"""
__device__ __forceinline__ bool leads(double a, int index_a, double b, int index_b) {
    bool none_a = a != a, none_b = b != b;
    if (none_a != none_b) return none_a;
    if (a == b || none_a) return index_a < index_b;
    return a > b;
}
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }
extern "C" __global__ void judge(double* heads, const float* logits, int n_classes, int score) {
    const unsigned all = 0xffffffffu;
    const float* row = logits + (long long)blockIdx.x * n_classes;
    const double infinity = exp(1e4);
    // The two leading classes of this lane, then of all lanes. A lane without classes has none that leads any other.
    double top = -infinity, second = -infinity;
    int first = 0x7ffffffe, other = 0x7fffffff;
    for (int i = threadIdx.x; i < n_classes; i += 32) {
        double x = row[i];
        if (leads(x, i, top, first)) {
            second = top, other = first;
            top = x, first = i;
        } else if (leads(x, i, second, other)) second = x, other = i;
    }
    for (int step = 16; step; step >>= 1) {
        double their_top = __shfl_xor_sync(all, top, step), their_second = __shfl_xor_sync(all, second, step);
        int their_first = __shfl_xor_sync(all, first, step), their_other = __shfl_xor_sync(all, other, step);
        if (leads(their_top, their_first, top, first)) {
            bool mine = leads(top, first, their_second, their_other);
            second = mine ? top : their_second, other = mine ? first : their_other;
            top = their_top, first = their_first;
        } else if (leads(their_top, their_first, second, other)) second = their_top, other = their_first;
    }
    double margin = top - second;
    if (!is_finite(margin)) margin = infinity - infinity;
    double rest = 0.0, surprise = 0.0;
    for (int i = threadIdx.x; i < n_classes; i += 32)
        if (i != first) {
            double beside_second = row[i] - second, weight = exp(beside_second);
            rest += weight;
            if (weight > 0.0) surprise += weight * (beside_second - margin);
        }
    for (int step = 16; step; step >>= 1) {
        rest += __shfl_xor_sync(all, rest, step);
        surprise += __shfl_xor_sync(all, surprise, step);
    }
    if (threadIdx.x) return;
    double runner_up = exp(-margin), beside = runner_up * rest, confidence = 1.0 / (1.0 + beside), surety;
    if (score == 0) surety = margin - log(rest);
    else if (score == 1) surety = margin;
    else if (score == 2) surety = -(beside + runner_up) * confidence;
    else surety = runner_up * surprise * confidence - log1p(beside);
    double* here = heads + 3LL * blockIdx.x;
    here[0] = first;
    here[1] = is_finite(confidence) ? confidence : 0.0;
    here[2] = is_finite(surety) ? surety : -infinity;
}
"""

SOURCES = {
    "bias_relu": HALVES + _BIAS_RELU,
    "concat": _CONCAT,
    "move": _MOVE,
    "max_pool": HALVES + _MAX_POOL,
    "centre": HALVES + _CENTRE,
    "judge": _JUDGE,
}
"""By the kernel's name."""

JUDGED = ("max_softmax", "logit_margin", "probability_margin", "entropy")
"""The scores that `judge` computes; a score's index is the number that the kernel takes."""
