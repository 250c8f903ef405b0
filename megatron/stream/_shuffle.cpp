// The inner loops of index maps, blends and sample reading, without any third-party header.
//
// Everything works on buffers (NumPy arrays, memory maps) that the Python side has checked for
// type and shape; here only sizes are checked, because a wrong one would be a memory error. The
// interpreter lock is released while a loop runs, so the shuffle of samples can run beside the
// walk over documents.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

// ---------------------------------------------------------------- buffers

// A contiguous buffer borrowed from a Python object for the length of one call.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }

    bool open(PyObject *object, bool writable) {
        const int flags = writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO;
        return PyObject_GetBuffer(object, &view_, flags) == 0;
    }

    template <typename T> T *data() const { return static_cast<T *>(view_.buf); }
    int64_t itemsize() const { return view_.itemsize; }
    int64_t bytes() const { return view_.len; }
    int64_t items() const { return view_.len / view_.itemsize; }

  private:
    Py_buffer view_{};
};

bool require_itemsize(const Buffer &buffer, int64_t itemsize, const char *name) {
    if (buffer.itemsize() == itemsize) return true;
    PyErr_Format(PyExc_TypeError, "%s must have items of %lld bytes, not %lld", name,
                 static_cast<long long>(itemsize), static_cast<long long>(buffer.itemsize()));
    return false;
}

// ---------------------------------------------------------------- NumPy's legacy generator

constexpr int kStateWords = 624;
constexpr int kShift = 397;

// MT19937 on the state words that numpy.random.RandomState.get_state() gives, updated in place.
class MersenneTwister {
  public:
    MersenneTwister(uint32_t *key, int position) : key_(key), position_(position) {}

    int position() const { return position_; }

    uint32_t next32() {
        if (position_ >= kStateWords) regenerate();
        return temper(key_[position_++]);
    }

    uint64_t next64() {  // the first word drawn is the upper half
        const uint64_t upper = next32();
        return upper << 32 | next32();
    }

    // Draw targets for the limits first_limit, first_limit - 1, ...: each uniform in [0, limit] by
    // masking and rejection. All limits of one call share `mask`, the smallest 2^b - 1 >= limit.
    // The counter advances without a branch, since a rejection can't be predicted.
    int64_t draw32(uint32_t first_limit, uint32_t mask, int64_t wanted, uint32_t *targets) {
        int64_t drawn = 0;
        while (drawn < wanted) {
            if (position_ >= kStateWords) regenerate();
            do {
                const uint32_t value = temper(key_[position_++]) & mask;
                targets[drawn] = value;
                drawn += value <= first_limit - static_cast<uint32_t>(drawn);
            } while (drawn < wanted && position_ < kStateWords);
        }
        return drawn;
    }

    uint64_t draw64(uint64_t limit, uint64_t mask) {
        uint64_t value = next64() & mask;
        while (value > limit) value = next64() & mask;
        return value;
    }

  private:
    static uint32_t temper(uint32_t word) {
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c5680u;
        word ^= (word << 15) & 0xefc60000u;
        return word ^ (word >> 18);
    }

    static uint32_t twist(uint32_t upper, uint32_t lower) {
        const uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
        return (mixed >> 1) ^ ((0u - (lower & 1u)) & 0x9908b0dfu);
    }

    void regenerate() {
        constexpr int head = kStateWords - kShift;
        for (int i = 0; i < head; ++i) key_[i] = key_[i + kShift] ^ twist(key_[i], key_[i + 1]);
        for (int i = head; i < kStateWords - 1; ++i)
            key_[i] = key_[i - head] ^ twist(key_[i], key_[i + 1]);
        key_[kStateWords - 1] = key_[kShift - 1] ^ twist(key_[kStateWords - 1], key_[0]);
        position_ = 0;
    }

    uint32_t *key_;
    int position_;
};

uint64_t mask_for(uint64_t limit) {
    uint64_t mask = limit;
    for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
    return mask;
}

// Targets of a Fisher-Yates shuffle from the end, for limit, limit - 1, ... down to 1, in blocks.
constexpr int64_t kBlock = 64;

struct Targets {
    uint64_t first_limit = 0;
    int64_t count = 0;
    uint32_t target[kBlock];
};

// Draw the next block; `limit` is the largest index not yet given a target.
void draw_block(MersenneTwister &generator, uint64_t limit, Targets &block) {
    const uint64_t mask = mask_for(limit);
    const int64_t same_mask = static_cast<int64_t>(limit - (mask >> 1));
    block.first_limit = limit;
    block.count = generator.draw32(static_cast<uint32_t>(limit), static_cast<uint32_t>(mask),
                                   std::min(kBlock, same_mask), block.target);
}

// The targets don't depend on the data: a block is drawn, and its cache lines asked for, while the
// block before it is swapped.
template <typename T> void shuffle_items(MersenneTwister &generator, T *items, int64_t count) {
    uint64_t limit = count > 0 ? static_cast<uint64_t>(count) - 1 : 0;
    for (; limit > std::numeric_limits<uint32_t>::max(); --limit)
        std::swap(items[limit], items[generator.draw64(limit, mask_for(limit))]);

    Targets blocks[2];
    int current = 0;
    while (limit > 0 || blocks[current].count > 0) {
        Targets &ahead = blocks[1 - current];
        ahead.count = 0;
        if (limit > 0) {
            draw_block(generator, limit, ahead);
            for (int64_t i = 0; i < ahead.count; ++i)
                __builtin_prefetch(items + ahead.target[i], 1);
            limit -= static_cast<uint64_t>(ahead.count);
        }
        const Targets &ready = blocks[current];
        T *item = items + ready.first_limit;
        for (int64_t i = 0; i < ready.count; ++i, --item) std::swap(*item, items[ready.target[i]]);
        current = 1 - current;
    }
}

bool open_generator(PyObject *object, int position, Buffer &key) {
    if (!key.open(object, true) || !require_itemsize(key, 4, "key")) return false;
    if (key.items() == kStateWords && position >= 0 && position <= kStateWords) return true;
    PyErr_SetString(PyExc_ValueError, "a generator state is 624 words and a position in 0..624");
    return false;
}

PyObject *shuffle(PyObject *, PyObject *arguments) {
    PyObject *array_object, *key_object;
    int position;
    if (!PyArg_ParseTuple(arguments, "OOi", &array_object, &key_object, &position)) return nullptr;
    Buffer array, key;
    if (!array.open(array_object, true) || !open_generator(key_object, position, key))
        return nullptr;
    if (array.itemsize() != 4 && array.itemsize() != 8) {
        PyErr_SetString(PyExc_TypeError, "only arrays of 4- or 8-byte items can be shuffled");
        return nullptr;
    }
    MersenneTwister generator(key.data<uint32_t>(), position);
    Py_BEGIN_ALLOW_THREADS;
    if (array.itemsize() == 4)
        shuffle_items(generator, array.data<uint32_t>(), array.items());
    else
        shuffle_items(generator, array.data<uint64_t>(), array.items());
    Py_END_ALLOW_THREADS;
    return PyLong_FromLong(generator.position());
}

PyObject *draw_wide(PyObject *, PyObject *arguments) {
    PyObject *key_object;
    unsigned long long limit;
    int position;
    if (!PyArg_ParseTuple(arguments, "KOi", &limit, &key_object, &position)) return nullptr;
    Buffer key;
    if (!open_generator(key_object, position, key)) return nullptr;
    MersenneTwister generator(key.data<uint32_t>(), position);
    const unsigned long long target = generator.draw64(limit, mask_for(limit));
    return Py_BuildValue("Ki", target, generator.position());
}

// ---------------------------------------------------------------- sample boundaries

constexpr int64_t kPrefetchDocuments = 48;

// Sizes come straight from an .idx file, where they are not aligned.
int64_t load_size(const unsigned char *sizes, int64_t document) {
    int32_t size;
    std::memcpy(&size, sizes + document * 4, 4);
    return size;
}

struct Walk {
    const unsigned char *sizes;
    int64_t num_sizes;
    const int32_t *documents;
    int64_t num_documents;
    int64_t stride;    // tokens from one row to the next
    int64_t document;  // index into `documents`
    int64_t ahead;     // tokens from that document's first one to the next row's
};

// Why a walk stopped before all rows were written.
enum class WalkError { none, documents_end, bad_document, bad_size };

template <typename T> WalkError walk_rows(Walk &walk, T *rows, int64_t num_rows) {
    int64_t size = 0;
    auto enter = [&walk, &size]() {
        if (walk.document >= walk.num_documents) return WalkError::documents_end;
        const int64_t later = walk.document + kPrefetchDocuments;
        if (later < walk.num_documents) {
            const int64_t next = walk.documents[later];
            if (next >= 0 && next < walk.num_sizes) __builtin_prefetch(walk.sizes + next * 4);
        }
        const int64_t id = walk.documents[walk.document];
        if (id < 0 || id >= walk.num_sizes) return WalkError::bad_document;
        size = load_size(walk.sizes, id);
        return size < 0 ? WalkError::bad_size : WalkError::none;
    };
    if (num_rows == 0) return WalkError::none;
    WalkError error = enter();
    for (int64_t row = 0; row < num_rows; ++row) {
        while (error == WalkError::none && walk.ahead >= size) {
            walk.ahead -= size;
            ++walk.document;
            error = enter();
        }
        if (error != WalkError::none) return error;
        rows[2 * row] = static_cast<T>(walk.document);
        rows[2 * row + 1] = static_cast<T>(walk.ahead);
        walk.ahead += walk.stride;
    }
    return WalkError::none;
}

PyObject *walk(PyObject *, PyObject *arguments) {
    PyObject *sizes_object, *documents_object, *rows_object;
    long long stride, document, ahead;
    if (!PyArg_ParseTuple(arguments, "OOOLLL", &sizes_object, &documents_object, &rows_object,
                          &stride, &document, &ahead))
        return nullptr;
    Buffer sizes, documents, rows;
    if (!sizes.open(sizes_object, false) || !documents.open(documents_object, false) ||
        !rows.open(rows_object, true))
        return nullptr;
    if (!require_itemsize(sizes, 4, "sizes") || !require_itemsize(documents, 4, "documents"))
        return nullptr;
    if (stride < 1 || document < 0 || ahead < 0) {
        PyErr_SetString(PyExc_ValueError, "stride must be positive, document and ahead >= 0");
        return nullptr;
    }
    if (rows.itemsize() != 4 && rows.itemsize() != 8) {
        PyErr_SetString(PyExc_TypeError, "rows must be int32 or int64");
        return nullptr;
    }
    Walk state{sizes.data<unsigned char>(), sizes.items(), documents.data<int32_t>(),
               documents.items(),           stride,        document,
               ahead};
    WalkError error;
    Py_BEGIN_ALLOW_THREADS;
    if (rows.itemsize() == 4)
        error = walk_rows(state, rows.data<int32_t>(), rows.items() / 2);
    else
        error = walk_rows(state, rows.data<int64_t>(), rows.items() / 2);
    Py_END_ALLOW_THREADS;
    switch (error) {
    case WalkError::none:
        return Py_BuildValue("LL", static_cast<long long>(state.document),
                             static_cast<long long>(state.ahead));
    case WalkError::documents_end:
        return PyErr_Format(PyExc_ValueError, "the %lld documents have too few tokens for the rows",
                            static_cast<long long>(state.num_documents));
    case WalkError::bad_document:
        return PyErr_Format(PyExc_ValueError, "document %lld at %lld is not one of %lld",
                            static_cast<long long>(state.documents[state.document]),
                            static_cast<long long>(state.document),
                            static_cast<long long>(state.num_sizes));
    case WalkError::bad_size:
        break;
    }
    return PyErr_Format(PyExc_ValueError, "document %lld has a negative size",
                        static_cast<long long>(state.documents[state.document]));
}

// ---------------------------------------------------------------- blends

// At draw n the dataset furthest behind weight * max(n, 1) is next; the lowest index wins a tie.
// Each product is rounded to float64 before the subtraction, as in NeoX: a fused multiply-add
// would draw differently, so it goes through memory where the compiler could contract it.
void draw(const double *weights, int64_t *counts, int64_t num_datasets, int64_t first_draw,
          int64_t num_draws, int16_t *datasets, int64_t *samples) {
    for (int64_t n = 0; n < num_draws; ++n) {
        const double due = std::max(static_cast<double>(first_draw + n), 1.0);
        int64_t chosen = 0;
        double largest = -std::numeric_limits<double>::infinity();
        for (int64_t i = 0; i < num_datasets; ++i) {
#if defined(__FMA__) || defined(__aarch64__)
            volatile double wanted = weights[i] * due;
#else
            const double wanted = weights[i] * due;
#endif
            const double error = wanted - static_cast<double>(counts[i]);
            if (error > largest) {
                largest = error;
                chosen = i;
            }
        }
        datasets[n] = static_cast<int16_t>(chosen);
        samples[n] = counts[chosen]++;
    }
}

PyObject *draw_blend(PyObject *, PyObject *arguments) {
    PyObject *weights_object, *counts_object, *datasets_object, *samples_object;
    long long first_draw;
    if (!PyArg_ParseTuple(arguments, "OOLOO", &weights_object, &counts_object, &first_draw,
                          &datasets_object, &samples_object))
        return nullptr;
    Buffer weights, counts, datasets, samples;
    if (!weights.open(weights_object, false) || !counts.open(counts_object, true) ||
        !datasets.open(datasets_object, true) || !samples.open(samples_object, true))
        return nullptr;
    if (!require_itemsize(weights, 8, "weights") || !require_itemsize(counts, 8, "counts") ||
        !require_itemsize(datasets, 2, "datasets") || !require_itemsize(samples, 8, "samples"))
        return nullptr;
    if (weights.items() < 1 || weights.items() != counts.items() ||
        datasets.items() != samples.items()) {
        PyErr_SetString(PyExc_ValueError, "weights and counts, datasets and samples must match");
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS;
    draw(weights.data<double>(), counts.data<int64_t>(), weights.items(), first_draw,
         datasets.items(), datasets.data<int16_t>(), samples.data<int64_t>());
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

// ---------------------------------------------------------------- checks of foreign maps

constexpr int64_t kPrefetchCounters = 64;

// Count how often first, first + 1, ... occur; counters stay at their maximum once reached.
// False if a value lies outside of the counters.
template <typename V, typename C>
bool count_values(const V *values, int64_t num_values, V first, C *counters,
                  int64_t num_counters) {
    const auto range = static_cast<uint64_t>(num_counters);
    for (int64_t i = 0; i < num_values; ++i) {
        if (i + kPrefetchCounters < num_values) {
            const uint64_t later = static_cast<V>(values[i + kPrefetchCounters] - first);
            if (later < range) __builtin_prefetch(counters + later, 1);
        }
        const uint64_t index = static_cast<V>(values[i] - first);
        if (index >= range) return false;
        if (counters[index] != std::numeric_limits<C>::max()) ++counters[index];
    }
    return true;
}

PyObject *count_occurrences(PyObject *, PyObject *arguments) {
    PyObject *values_object, *counters_object;
    unsigned long long first;
    if (!PyArg_ParseTuple(arguments, "OKO", &values_object, &first, &counters_object))
        return nullptr;
    Buffer values, counters;
    if (!values.open(values_object, false) || !counters.open(counters_object, true))
        return nullptr;
    const bool narrow = counters.itemsize() == 1;
    if ((values.itemsize() != 4 && values.itemsize() != 8) ||
        (!narrow && counters.itemsize() != 4)) {
        PyErr_SetString(PyExc_TypeError, "values have 4 or 8 bytes, counters 1 or 4");
        return nullptr;
    }
    const int64_t num_values = values.items(), num_counters = counters.items();
    bool inside;
    Py_BEGIN_ALLOW_THREADS;
    if (values.itemsize() == 4) {
        const auto *data = values.data<uint32_t>();
        const auto start = static_cast<uint32_t>(first);
        inside = narrow ? count_values(data, num_values, start, counters.data<uint8_t>(),
                                       num_counters)
                        : count_values(data, num_values, start, counters.data<uint32_t>(),
                                       num_counters);
    } else {
        const auto *data = values.data<uint64_t>();
        const auto start = static_cast<uint64_t>(first);
        inside = narrow ? count_values(data, num_values, start, counters.data<uint8_t>(),
                                       num_counters)
                        : count_values(data, num_values, start, counters.data<uint32_t>(),
                                       num_counters);
    }
    Py_END_ALLOW_THREADS;
    return PyBool_FromLong(inside);
}

// ---------------------------------------------------------------- reading tokens

struct Spans {
    const int64_t *sources;  // byte offsets
    const int64_t *targets;
    const int64_t *sizes;  // bytes
    int64_t count;
};

// Consecutive files as one row of bytes.
struct Files {
    const int64_t *addresses;  // of the mapped files; 0: not mapped yet
    const int64_t *bounds;     // where each begins, and where the last one ends
    int64_t count;

    int64_t size() const { return bounds[count]; }

    // The file that holds a byte; of empty files at one place the last.
    int64_t file_of(int64_t byte) const {
        // All but the last have one size, mostly.
        const int64_t guess = std::min(byte / std::max(bounds[1] - bounds[0], INT64_C(1)), count - 1);
        if (bounds[guess] <= byte && byte < bounds[guess + 1]) return guess;
        return std::upper_bound(bounds, bounds + count, byte) - bounds - 1;
    }

    const unsigned char *at(int64_t file, int64_t byte) const {
        return reinterpret_cast<const unsigned char *>(addresses[file]) + (byte - bounds[file]);
    }
};

constexpr int64_t kDone = -1;
constexpr int64_t kOutside = -2;

// kDone, kOutside if a span leaves source or target, or the number of a file that must be mapped
// before; the latter two possibly after some copies.
int64_t copy(const Files &files, const Buffer &target, const Spans &spans) {
    constexpr int64_t block = 16;  // spans; each is a jump the hardware can't foresee
    int64_t file[block] = {};
    auto *to = target.data<unsigned char>();
    for (int64_t first = 0; first < spans.count; first += block) {
        const int64_t stop = std::min(first + block, spans.count);
        for (int64_t i = first; i < stop; ++i) {
            const int64_t size = spans.sizes[i], source = spans.sources[i];
            if (size < 0 || size > files.size() || size > target.bytes()) return kOutside;
            if (source < 0 || source > files.size() - size) return kOutside;
            if (spans.targets[i] < 0 || spans.targets[i] > target.bytes() - size) return kOutside;
            if (size == 0) continue;
            file[i - first] = files.file_of(source);
            for (int64_t k = file[i - first]; k < files.count && files.bounds[k] < source + size; ++k)
                if (files.addresses[k] == 0 && files.bounds[k] < files.bounds[k + 1]) return k;
            __builtin_prefetch(files.at(file[i - first], source));
        }
        for (int64_t i = first; i < stop; ++i) {
            int64_t left = spans.sizes[i], byte = spans.sources[i];
            auto *out = to + spans.targets[i];
            for (int64_t k = file[i - first]; left > 0; ++k) {
                const int64_t part = std::min(left, files.bounds[k + 1] - byte);
                if (part == 0) continue;
                std::memcpy(out, files.at(k, byte), static_cast<size_t>(part));
                left -= part, byte += part, out += part;
            }
        }
    }
    return kDone;
}

PyObject *copy_from_files(PyObject *, PyObject *arguments) {
    PyObject *addresses_object, *bounds_object, *target_object, *sources_object, *targets_object,
        *sizes_object;
    if (!PyArg_ParseTuple(arguments, "OOOOOO", &addresses_object, &bounds_object, &target_object,
                          &sources_object, &targets_object, &sizes_object))
        return nullptr;
    Buffer addresses, bounds, target, sources, targets, sizes;
    if (!addresses.open(addresses_object, false) || !bounds.open(bounds_object, false) ||
        !target.open(target_object, true) || !sources.open(sources_object, false) ||
        !targets.open(targets_object, false) || !sizes.open(sizes_object, false))
        return nullptr;
    if (!require_itemsize(addresses, 8, "addresses") || !require_itemsize(bounds, 8, "bounds") ||
        !require_itemsize(sources, 8, "sources") || !require_itemsize(targets, 8, "targets") ||
        !require_itemsize(sizes, 8, "sizes"))
        return nullptr;
    if (sources.items() != sizes.items() || targets.items() != sizes.items()) {
        PyErr_SetString(PyExc_ValueError, "sources, targets and sizes must have the same length");
        return nullptr;
    }
    if (bounds.items() != addresses.items() + 1) {
        PyErr_SetString(PyExc_ValueError, "bounds must have one item more than addresses");
        return nullptr;
    }
    const Files files{addresses.data<int64_t>(), bounds.data<int64_t>(), addresses.items()};
    const Spans spans{sources.data<int64_t>(), targets.data<int64_t>(), sizes.data<int64_t>(),
                      sizes.items()};
    int64_t result;
    Py_BEGIN_ALLOW_THREADS;
    result = copy(files, target, spans);
    Py_END_ALLOW_THREADS;
    if (result != kOutside) return PyLong_FromLongLong(result);
    PyErr_SetString(PyExc_ValueError, "a span leaves the source or the target");
    return nullptr;
}

// ---------------------------------------------------------------- module

PyMethodDef kMethods[] = {
    {"shuffle", shuffle, METH_VARARGS,
     "shuffle(array, key, position) -> position\n\nShuffle in place as RandomState does."},
    {"draw_wide", draw_wide, METH_VARARGS,
     "draw_wide(limit, key, position) -> (target, position)\n\nOne target above 2**32 items."},
    {"walk", walk, METH_VARARGS,
     "walk(sizes, documents, rows, stride, document, ahead) -> (document, ahead)\n\n"
     "Fill rows with (index into documents, token offset), `stride` tokens apart."},
    {"draw_blend", draw_blend, METH_VARARGS,
     "draw_blend(weights, counts, first_draw, datasets, samples)\n\nContinue a blend."},
    {"count_occurrences", count_occurrences, METH_VARARGS,
     "count_occurrences(values, first, counters) -> bool\n\nFalse if a value has no counter."},
    {"copy_from_files", copy_from_files, METH_VARARGS,
     "copy_from_files(addresses, bounds, target, sources, targets, sizes) -> file\n\n"
     "Copy byte spans of consecutive mapped files; -1, or the number of one to map first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_shuffle", "Inner loops of index maps, blends and reads.", 0, kMethods,
    nullptr,               nullptr,    nullptr,                                        nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__shuffle(void) { return PyModule_Create(&kModule); }
