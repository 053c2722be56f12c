/* LAMB's and LARS's steps on lists of tensors: optim/on_cpu/lists.py compiles this for REAL float and double. Plain loops
   over restricted pointers, which any C compiler makes vector instructions of; OpenMP, if there is one, shares out the
   blocks. */
#include <math.h>
#include <stdint.h>

typedef REAL real;

/* See batchlab.optim.tables: where each tensor begins, of which tensor and which of its blocks each block is. */
typedef struct {
    const int64_t *where;
    const int32_t *of;
    const int64_t *at, *sizes;
    int64_t tensors, blocks, length;
} lists;

typedef struct {
    int64_t tensor, first, count;
} place;

static place place_of(const lists *l, int64_t block) {
    int64_t tensor = l->of[block], first = l->at[block] * l->length, left = l->sizes[tensor] - first;
    return (place){tensor, first, left < l->length ? left : l->length};
}

static real *start_of(const lists *l, int row, place p) {
    return (real *)(intptr_t)l->where[row * l->tensors + p.tensor] + p.first;
}

/* parts: (rows, blocks), sums of squares of each block of the first two lists. */
void squares(const lists *l, int threads, double *parts) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < l->blocks; block++) {
        place p = place_of(l, block);
        const real *restrict w = start_of(l, 0, p), *restrict g = start_of(l, 1, p);
        real w_sq = 0, g_sq = 0;
#pragma omp simd reduction(+ : w_sq, g_sq)
        for (int64_t i = 0; i < p.count; i++) {
            w_sq += w[i] * w[i];
            g_sq += g[i] * g[i];
        }
        parts[block] = w_sq;
        parts[l->blocks + block] = g_sq;
    }
}

typedef struct {
    real rate, share1, keep2, share2, eps, decay;
} lamb_numbers;

/* Lists w, g, m, v. parts: (2, blocks), sums of w and u squared; where there are none, the step is taken at once. */
void lamb_averages(const lists *l, int threads, double *parts, const lamb_numbers *given) {
    const lamb_numbers n = *given;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < l->blocks; block++) {
        place p = place_of(l, block);
        real *restrict w = start_of(l, 0, p), *restrict m = start_of(l, 2, p), *restrict v = start_of(l, 3, p);
        const real *restrict g = start_of(l, 1, p);
        if (parts) {
            real w_sq = 0, u_sq = 0;
#pragma omp simd reduction(+ : w_sq, u_sq)
            for (int64_t i = 0; i < p.count; i++) {
                real mi = m[i] + n.share1 * (g[i] - m[i]), vi = n.keep2 * v[i] + n.share2 * g[i] * g[i];
                real u = mi / (SQRT(vi) + n.eps) + n.decay * w[i];
                m[i] = mi;
                v[i] = vi;
                w_sq += w[i] * w[i];
                u_sq += u * u;
            }
            parts[block] = w_sq;
            parts[l->blocks + block] = u_sq;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < p.count; i++) {
                real mi = m[i] + n.share1 * (g[i] - m[i]), vi = n.keep2 * v[i] + n.share2 * g[i] * g[i];
                m[i] = mi;
                v[i] = vi;
                w[i] -= n.rate * (mi / (SQRT(vi) + n.eps) + n.decay * w[i]);
            }
        }
    }
}

/* rates: of each tensor. */
void lamb_step(const lists *l, int threads, const real *rates, const lamb_numbers *given) {
    const lamb_numbers n = *given;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < l->blocks; block++) {
        place p = place_of(l, block);
        real *restrict w = start_of(l, 0, p);
        const real *restrict m = start_of(l, 2, p), *restrict v = start_of(l, 3, p), rate = rates[p.tensor];
#pragma omp simd
        for (int64_t i = 0; i < p.count; i++) w[i] -= rate * (m[i] / (SQRT(v[i]) + n.eps) + n.decay * w[i]);
    }
}

typedef struct {
    real momentum, decay, rate;
} lars_numbers;

/* Lists w, g, v. scales: of each tensor. rate: of the step by v. */
void lars_step(const lists *l, int threads, const real *scales, const lars_numbers *given) {
    const lars_numbers n = *given;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < l->blocks; block++) {
        place p = place_of(l, block);
        real *restrict w = start_of(l, 0, p), *restrict v = start_of(l, 2, p);
        const real *restrict g = start_of(l, 1, p), scale = scales[p.tensor];
#pragma omp simd
        for (int64_t i = 0; i < p.count; i++) {
            v[i] = n.momentum * v[i] + scale * (g[i] + n.decay * w[i]);
            w[i] -= n.rate * v[i];
        }
    }
}
