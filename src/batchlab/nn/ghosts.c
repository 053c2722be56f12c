/* Ghost batch normalisation, forward and backward, for REAL float and double: nn/ghost_c.py compiles this. A unit of work
   is a ghost and a channel, or, where channels lie side by side, up to SIDE of them: its numbers are read from memory once
   and from the cache then. Sums are of few numbers in real and of those in double. */
#include <math.h>
#include <stdint.h>

typedef REAL real;

enum { SIDE = 64, RUN = 64, PLACES = 4096 };

/* Loops over channels side by side, or over few places, are far shorter where the compiler knows how many. */
#define KNOWN(call, count) \
    do { \
        if ((count) == 64) call(64); \
        else if ((count) == 16) call(16); \
        else call(count); \
    } while (0)
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* last: whether channels lie side by side, (examples, places, channels), else (examples, channels, places). The last
   ghost has `rest` examples, all others `size`. */
typedef struct {
    int64_t ghosts, size, rest, channels, places, last;
} shape;

/* mean, invstd, spread: (ghosts, channels); spread is the variance with the divisor n - 1. One after another in memory. */
typedef struct {
    double *mean, *invstd, *spread;
} stats;

static stats stats_at(const shape *s, double *first) {
    const int64_t each = s->ghosts * s->channels;
    return (stats){first, first + each, first + 2 * each};
}

static int64_t examples_of(const shape *s, int64_t ghost) { return ghost + 1 < s->ghosts ? s->size : s->rest; }

static const real *at(const shape *s, const real *x, int64_t ghost, int64_t example, int64_t channel) {
    return x + ((ghost * s->size + example) * s->channels + channel) * s->places;
}

/* of, of_one_less: 1/n and 1/(n - 1), worked out once for all channels: divisions are dear. */
INLINE void settle(const stats *t, int64_t index, double mean, double squares, double of, double of_one_less, double eps) {
    t->mean[index] = mean;
    t->invstd[index] = 1 / sqrt(squares * of + eps);
    t->spread[index] = squares * of_one_less;
}

INLINE void forward_apart(const shape *s, int64_t ghost, int64_t c, int64_t places, const real *x, const real *weight,
                          const real *bias, real *y, const stats *t, double eps) {
    const int64_t examples = examples_of(s, ghost), index = ghost * s->channels + c;
    const double n = (double)examples * places;
    double sum = 0, squares = 0;
    for (int64_t e = 0; e < examples; e++) {
        const real *restrict row = at(s, x, ghost, e, c);
        for (int64_t first = 0; first < places; first += PLACES) {
            const int64_t end = first + PLACES < places ? first + PLACES : places;
            real part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = first; i < end; i++) part += row[i];
            sum += part;
        }
    }
    const real mean = (real)(sum / n);
    for (int64_t e = 0; e < examples; e++) {
        const real *restrict row = at(s, x, ghost, e, c);
        for (int64_t first = 0; first < places; first += PLACES) {
            const int64_t end = first + PLACES < places ? first + PLACES : places;
            real part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = first; i < end; i++) part += (row[i] - mean) * (row[i] - mean);
            squares += part;
        }
    }
    settle(t, index, mean, squares, 1 / n, 1 / (n - 1), eps);
    const real scale = (real)t->invstd[index] * (weight ? weight[c] : 1), shift = bias ? bias[c] : 0;
    for (int64_t e = 0; e < examples; e++) {
        const real *restrict row = at(s, x, ghost, e, c);
        real *restrict out = (real *)at(s, y, ghost, e, c);
#pragma omp simd
        for (int64_t i = 0; i < places; i++) out[i] = (row[i] - mean) * scale + shift;
    }
}

/* Channels c to c + count of one ghost, side by side. */
INLINE void forward_beside(const shape *s, int64_t ghost, int64_t c, int64_t count, const real *x, const real *weight,
                           const real *bias, real *y, const stats *t, double eps) {
    const int64_t rows = examples_of(s, ghost) * s->places, begin = ghost * s->size * s->places;
    const int64_t index = ghost * s->channels + c;
    const double of = 1 / (double)rows, of_one_less = 1 / (double)(rows - 1);
    double sum[SIDE] = {0}, squares[SIDE] = {0};
    real mean[SIDE], scale[SIDE], shift[SIDE];
    for (int64_t first = 0; first < rows; first += RUN) {
        real part[SIDE] = {0};
        for (int64_t r = first; r < rows && r < first + RUN; r++) {
            const real *restrict row = x + (begin + r) * s->channels + c;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) part[j] += row[j];
        }
        for (int64_t j = 0; j < count; j++) sum[j] += part[j];
    }
    for (int64_t j = 0; j < count; j++) mean[j] = (real)(sum[j] * of);
    for (int64_t first = 0; first < rows; first += RUN) {
        real part[SIDE] = {0};
        for (int64_t r = first; r < rows && r < first + RUN; r++) {
            const real *restrict row = x + (begin + r) * s->channels + c;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) part[j] += (row[j] - mean[j]) * (row[j] - mean[j]);
        }
        for (int64_t j = 0; j < count; j++) squares[j] += part[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < count; j++) settle(t, index + j, mean[j], squares[j], of, of_one_less, eps);
    for (int64_t j = 0; j < count; j++) {
        scale[j] = (real)t->invstd[index + j] * (weight ? weight[c + j] : 1);
        shift[j] = bias ? bias[c + j] : 0;
    }
    for (int64_t r = 0; r < rows; r++) {
        const real *restrict row = x + (begin + r) * s->channels + c;
        real *restrict out = y + (begin + r) * s->channels + c;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[j] = (row[j] - mean[j]) * scale[j] + shift[j];
    }
}

/* A running statistic, (channels), after one ghost after another, each with its momentum. stat: (ghosts, channels). */
static void advance(const shape *s, const double *stat, const double *momenta, real *run) {
    for (int64_t c = 0; c < s->channels; c += SIDE) {
        const int64_t count = s->channels - c < SIDE ? s->channels - c : SIDE;
        double kept[SIDE];
        for (int64_t j = 0; j < count; j++) kept[j] = run[c + j];
        for (int64_t ghost = 0; ghost < s->ghosts; ghost++) {
            const double *restrict own = stat + ghost * s->channels + c;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) kept[j] += momenta[ghost] * (own[j] - kept[j]);
        }
        for (int64_t j = 0; j < count; j++) run[c + j] = (real)kept[j];
    }
}

/* kept: (3, ghosts, channels), see stats. run_mean, run_var: (channels), moved by one ghost after another with its momentum; NULL without. */
void ghosts_forward(const shape *s, int threads, const real *x, const real *weight, const real *bias, real *y,
                    double *kept, real *run_mean, real *run_var, const double *momenta, double eps) {
    const stats of = stats_at(s, kept), *t = &of;
    const int64_t width = s->last ? SIDE : 1, across = (s->channels + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < s->ghosts * across; unit++) {
        const int64_t ghost = unit / across, c = unit % across * width, left = s->channels - c;
#define FORWARD(count) forward_beside(s, ghost, c, count, x, weight, bias, y, t, eps)
#define FORWARD_APART(places) forward_apart(s, ghost, c, places, x, weight, bias, y, t, eps)
        if (s->last)
            KNOWN(FORWARD, left < SIDE ? left : SIDE);
        else
            KNOWN(FORWARD_APART, s->places);
    }
    if (run_mean) advance(s, t->mean, momenta, run_mean);
    if (run_var) advance(s, t->spread, momenta, run_var);
}

/* slopes, totals: (ghosts, channels), sums of (x - mean)dy and of dy. */
typedef struct {
    double *slopes, *totals;
} sums;

INLINE void backward_apart(const shape *s, int64_t ghost, int64_t c, int64_t places, const real *x, const real *dy,
                           const real *weight, real *dx, const stats *t, const sums *found) {
    const int64_t examples = examples_of(s, ghost), index = ghost * s->channels + c;
    const double n = (double)examples * places, invstd = t->invstd[index];
    const real mean = (real)t->mean[index];
    double slope = 0, total = 0;
    for (int64_t e = 0; e < examples; e++) {
        const real *restrict row = at(s, x, ghost, e, c), *restrict back = at(s, dy, ghost, e, c);
        for (int64_t first = 0; first < places; first += PLACES) {
            const int64_t end = first + PLACES < places ? first + PLACES : places;
            real part = 0, plain = 0;
#pragma omp simd reduction(+ : part, plain)
            for (int64_t i = first; i < end; i++) {
                part += (row[i] - mean) * back[i];
                plain += back[i];
            }
            slope += part;
            total += plain;
        }
    }
    found->slopes[index] = slope;
    found->totals[index] = total;
    if (!dx) return;
    const real scale = (real)(invstd * (weight ? weight[c] : 1)), level = (real)(total / n);
    const real pull = (real)(slope * invstd * invstd / n);
    for (int64_t e = 0; e < examples; e++) {
        const real *restrict row = at(s, x, ghost, e, c), *restrict back = at(s, dy, ghost, e, c);
        real *restrict out = (real *)at(s, dx, ghost, e, c);
#pragma omp simd
        for (int64_t i = 0; i < places; i++) out[i] = scale * (back[i] - level - (row[i] - mean) * pull);
    }
}

INLINE void backward_beside(const shape *s, int64_t ghost, int64_t c, int64_t count, const real *x, const real *dy,
                            const real *weight, real *dx, const stats *t, const sums *found) {
    const int64_t rows = examples_of(s, ghost) * s->places, begin = ghost * s->size * s->places;
    const int64_t index = ghost * s->channels + c;
    double slope[SIDE] = {0}, total[SIDE] = {0};
    real mean[SIDE], scale[SIDE], level[SIDE], pull[SIDE];
    for (int64_t j = 0; j < count; j++) mean[j] = (real)t->mean[index + j];
    for (int64_t first = 0; first < rows; first += RUN) {
        real part[SIDE] = {0}, plain[SIDE] = {0};
        for (int64_t r = first; r < rows && r < first + RUN; r++) {
            const real *restrict row = x + (begin + r) * s->channels + c;
            const real *restrict back = dy + (begin + r) * s->channels + c;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) {
                part[j] += (row[j] - mean[j]) * back[j];
                plain[j] += back[j];
            }
        }
        for (int64_t j = 0; j < count; j++) {
            slope[j] += part[j];
            total[j] += plain[j];
        }
    }
    for (int64_t j = 0; j < count; j++) {
        const double invstd = t->invstd[index + j];
        found->slopes[index + j] = slope[j];
        found->totals[index + j] = total[j];
        scale[j] = (real)(invstd * (weight ? weight[c + j] : 1));
        level[j] = (real)(total[j] / rows);
        pull[j] = (real)(slope[j] * invstd * invstd / rows);
    }
    for (int64_t r = 0; dx && r < rows; r++) {
        const real *restrict row = x + (begin + r) * s->channels + c;
        const real *restrict back = dy + (begin + r) * s->channels + c;
        real *restrict out = dx + (begin + r) * s->channels + c;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[j] = scale[j] * (back[j] - level[j] - (row[j] - mean[j]) * pull[j]);
    }
}

/* kept: as it was filled. room: (2, ghosts, channels). dx; dweight, dbias, (channels), sums over the ghosts: NULL where
   they are not wanted. */
void ghosts_backward(const shape *s, int threads, const real *x, const real *dy, const real *weight, real *dx,
                     double *kept, double *room, real *dweight, real *dbias) {
    const stats of = stats_at(s, kept), *t = &of;
    const sums in = {room, room + s->ghosts * s->channels}, *found = &in;
    const int64_t width = s->last ? SIDE : 1, across = (s->channels + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < s->ghosts * across; unit++) {
        const int64_t ghost = unit / across, c = unit % across * width, left = s->channels - c;
#define BACKWARD(count) backward_beside(s, ghost, c, count, x, dy, weight, dx, t, found)
#define BACKWARD_APART(places) backward_apart(s, ghost, c, places, x, dy, weight, dx, t, found)
        if (s->last)
            KNOWN(BACKWARD, left < SIDE ? left : SIDE);
        else
            KNOWN(BACKWARD_APART, s->places);
    }
    for (int64_t c = 0; (dweight || dbias) && c < s->channels; c += SIDE) {
        const int64_t count = s->channels - c < SIDE ? s->channels - c : SIDE;
        double by_weight[SIDE] = {0}, by_bias[SIDE] = {0};
        for (int64_t first = c; first < s->ghosts * s->channels; first += s->channels) {
            const double *restrict slopes = found->slopes + first, *restrict totals = found->totals + first;
            const double *restrict invstd = t->invstd + first;
#pragma omp simd
            for (int64_t j = 0; j < count; j++) {
                by_weight[j] += slopes[j] * invstd[j];
                by_bias[j] += totals[j];
            }
        }
        for (int64_t j = 0; j < count; j++) {
            if (dweight) dweight[c + j] = (real)by_weight[j];
            if (dbias) dbias[c + j] = (real)by_bias[j];
        }
    }
}
