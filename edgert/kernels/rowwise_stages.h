// The work of a call, a row at a time; included as each_processor.h says.

// Sum of squares in as many running sums as a vector has.
INLINE float inverse_rms(const float* x, int64_t width, float epsilon) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < width; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / static_cast<float>(width) + epsilon);
}

INLINE void scaled(const float* x, const float* weight, float by, int64_t width, float* y) {
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE) store(y + i, load(x + i) * all(by) * load(weight + i));
    for (; i < width; i++) y[i] = x[i] * by * weight[i];
}

void norm(void* call, size_t index) {
    const Rows& c = *static_cast<const Rows*>(call);
    for (int64_t r = c.first(index); r < c.first(index + 1); r++) {
        const float* x = c.x + r * c.width;
        scaled(x, c.weight, inverse_rms(x, c.width, c.epsilon), c.width, c.y + r * c.width);
    }
}

void skip_norm(void* call, size_t index) {
    const Rows& c = *static_cast<const Rows*>(call);
    for (int64_t r = c.first(index); r < c.first(index + 1); r++) {
        const float *x = c.x + r * c.width, *skip = c.skip + r % c.skip_rows * c.width;
        float *y = c.y + r * c.width, *total = c.total ? c.total + r * c.width : y;
        int64_t i = 0;
        for (; i + WIDE <= c.width; i += WIDE) store(total + i, load(x + i) + load(skip + i));
        for (; i < c.width; i++) total[i] = x[i] + skip[i];
        scaled(total, c.weight, inverse_rms(total, c.width, c.epsilon), c.width, y);
    }
}

// x has rows of 2 * width: the gate, then what it lets through.
void gate(void* call, size_t index) {
    const Rows& c = *static_cast<const Rows*>(call);
    for (int64_t r = c.first(index); r < c.first(index + 1); r++) {
        const float *x = c.x + r * 2 * c.width, *through = x + c.width;
        float* y = c.y + r * c.width;
        int64_t i = 0;
        for (; i + WIDE <= c.width; i += WIDE) store(y + i, silu(load(x + i)) * load(through + i));
        for (; i < c.width; i++) y[i] = silu(all(x[i]))[0] * through[i];
    }
}
