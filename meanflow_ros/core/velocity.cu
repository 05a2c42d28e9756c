// One evaluation of the action network, z -> velocity, as one kernel: ActionDiT of core/dit.py, as
// core/fused_dit.py writes it. core/persistent.py compiles and starts it.
//
// One program on each of WIDTH / 8 multiprocessors. A program computes 8 columns of everything
// that is WIDTH wide, and keeps those of the residual stream. Two things run beside each other:
//
// - One warp fetches what is constant (weights, modulation, keys and values) into shared memory, in
//   the order of its use and as far ahead as there is room: nobody waits for a weight.
// - The others compute. What one program computes and others read goes through `exchange`, a
//   place for each intermediate result. It holds NOTHING to begin with, and who reads asks again
//   until something else stands there: values are their own signal, so programs wait for nothing
//   but what they read. So that not all ask all the time, a program says that it has told its
//   part, and one warp of each program waits until all have said so. That is a hint and no more.
//
// All layers go through the same few lines: a program of which each part runs once is read from
// memory, instruction by instruction, and that takes longer than what it computes.
//
// A product has 16 rows, the steps of a chunk. Its depth is spread over the warps in pieces of 32,
// of which a lane reads 16 bytes: the depths 8 t .. 8 t + 7, t = lane % 4, of row lane / 4. That
// is not the order in which the tensor cores count, but the same for both factors, so sums agree.
//
// A modulated norm is (x / |x| * gain + shift) W = (x * gain) W / |x| + shift W. So who computes x
// tells x * gain, and its share of the squares; the shift is one more row of the product, the last,
// and that of steps that are given is the last but one. ROWS is 14 at most.
//
// Given by the compiler's command line: WIDTH, HIDDEN (of the MLP), DECODED (of the decoder's),
// HEADS, BLOCKS, ROWS, ACTIONS, WARPS, MEMORY (shared, bytes).

typedef unsigned int u32;
typedef unsigned short bf16;

__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int parts(int all, int size) { return (all + size - 1) / size; }

constexpr int HEAD = WIDTH / HEADS, PARTS = HEAD / 32;
constexpr int PROGRAMS = WIDTH / 8, THREADS = WARPS * 32;
constexpr int KEPT = ROWS * 8;                          // numbers of the residual stream
constexpr int PIECE = 1024;                             // depth of a slot
constexpr int PITCH = PIECE * 2 + 64, SLOT = 8 * PITCH; // bytes; rows begin 16 banks apart
constexpr int KEY_PITCH = HEAD + 32;                    // numbers; likewise
constexpr u32 NOTHING = 0xffffffff;                     // a NaN that no computation gives
constexpr u32 PATIENCE = 1u << 22;                      // questions, some seconds

// Tiles of 8 columns that a program computes at most; times the pieces of their depth.
constexpr int MLP_TILES = parts(HIDDEN / 8, PROGRAMS);
constexpr int DECODED_TILES = parts(DECODED / 8, PROGRAMS), ACTION_TILES = parts(ACTIONS, 8);
constexpr int TILES = most(most(3, 2 * MLP_TILES), most(
    parts(HIDDEN, PIECE), most(DECODED_TILES, ACTION_TILES) * parts(DECODED, PIECE)));
constexpr int LINES = ROWS + 2;                         // of a sum: rows, and those of shifts
constexpr int SUMS = WARPS * LINES * 8;                 // floats a tile, of all warps

// Where an intermediate result lies in `exchange`, in numbers of 2 bytes. After it come the hints,
// and squares: floats, one of each row and program.
constexpr int STREAM = ROWS * WIDTH, HINTS = PROGRAMS * 2, SQUARES = ROWS * PROGRAMS * 2;
constexpr int TOLD = STREAM + HINTS + SQUARES;
constexpr int QKV_AT = 0, ATTENDED = QKV_AT + 3 * STREAM + HINTS, X1 = ATTENDED + TOLD,
              QUERY_AT = X1 + TOLD, CROSSED = QUERY_AT + TOLD, X2 = CROSSED + TOLD,
              MIDDLE = X2 + TOLD, X3 = MIDDLE + ROWS * HIDDEN + HINTS, OF_BLOCK = X3 + TOLD;
constexpr int ENCODED = BLOCKS * OF_BLOCK, X0 = ENCODED + TOLD, FIRST = X0 + TOLD,
              SECOND = FIRST + ROWS * DECODED + HINTS;

// What modulates a block, and its layers with those around all blocks, in order.
enum { SHIFT_A, GAIN_A, GATE_A, SHIFT_M, GAIN_M, GATE_M };
enum { ENCODE, QKV, PROJ, QUERY, CROSS, GATE, MLP, DECODE_IN, DECODE_MIDDLE, DECODE_OUT };

struct Arguments {
    const float* z;              // (ROWS, ACTIONS)
    float* velocity;             // (ROWS, ACTIONS)
    bf16* exchange;
    const bf16 *encode_in, *encode_in_bias, *encode_out, *encode_out_bias;
    const bf16 *qkv, *proj, *query, *cross, *gate_and_value, *mlp;   // of all blocks
    const bf16 *straight, *swapped;                                  // (BLOCKS, ROWS, 2, HEAD)
    const bf16 *decode_in, *offset, *decode_middle, *decode_middle_bias, *decode_out,
        *decode_out_bias;
    const bf16 *modulation, *clean;        // of all steps, or of those that are not given and are
    const unsigned char* given;            // (ROWS) or null
    long long modulation_block, modulation_kind;
    const bf16 *keys, *values;   // (BLOCKS, HEADS, count, KEY_PITCH), (.., HEAD, count + 8)
    const bf16* bias;            // (count) or null
    int count;                   // of keys, a multiple of 32
};

// --- what the machine has --------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

template <int SOME = WARPS> __device__ __forceinline__ void together() {   // of those that compute
    asm volatile("bar.sync %0, %1;" ::"n"(SOME == WARPS ? 1 : 2), "n"(SOME * 32) : "memory");
}

__device__ __forceinline__ uint4 look(const void* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 look_at_one(const void* p) {   // a float, or a pair of bf16
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void tell(void* p, u32 one) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(one) : "memory");
}

// NOTHING if there is nothing in one of them.
__device__ __forceinline__ u32 missing(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)); }

// A constant, asked for here and not where it is used.
__device__ __forceinline__ float early(const bf16* p) {
    unsigned short v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return __uint_as_float((u32)v << 16);
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float number(bf16 x) { return __uint_as_float((u32)x << 16); }

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float rounded(float x) { return low(pair(x, 0.f)); }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A piece of 32 of the depth: rows lane / 4 and lane / 4 + 8 of one factor, a column of the other.
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& upper, const uint4& lower,
                                         const uint4& b) {
    multiply(c, upper.x, lower.x, upper.y, lower.y, b.x, b.y);
    multiply(c, upper.z, lower.z, upper.w, lower.w, b.z, b.w);
}

__device__ __forceinline__ float of_quad(float x) {   // the sum over lanes of the same row
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float most_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ void spread(const uint4& v, float (&x)[8]) {
    x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
    x[4] = low(v.z), x[5] = high(v.z), x[6] = low(v.w), x[7] = high(v.w);
}

__device__ __forceinline__ uint4 packed(const float (&x)[8]) {
    return make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
}

__device__ __forceinline__ float square(const uint4& v) {
    float x[8], sum = 0.f;
    spread(v, x);
    for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
    return sum;
}

// --- what a program shares ---------------------------------------------------------------------

// Constants of a block that are not weights, and when they are there.
enum Part { ATTENTION_SHIFT, TABLES, CONTEXT, MLP_SHIFT, KINDS };

constexpr int TURNING = parts(2 * ROWS * 8, 32);    // warps that turn q and k by their positions
constexpr int MOST_SLOTS = 16;

struct Shared {
    unsigned long long full[MOST_SLOTS], empty[MOST_SLOTS], part_full[KINDS], part_empty[KINDS];
    float lengths[16];                              // one over those of rows
    alignas(16) bf16 shift[2][2][WIDTH];            // attention or MLP; steps not given, given
    bf16 tables[2][ROWS][2][HEAD], turned[2][16][HEAD + 32];
    float sums[TILES * SUMS], attended[WARPS][16][8];
    float2 weights[WARPS][16];
};

__device__ __forceinline__ u32 after_shared() { return (sizeof(Shared) + 127) / 128 * 128; }

__device__ __forceinline__ u32 context_bytes(int count) {
    return (count * KEY_PITCH * 2 + 8 * (count + 8) * 2 + 127) / 128 * 128;
}

struct Side {   // one side of what is shared: where it is in the network, and in the ring
    const Arguments& of;
    Shared& shared;
    bf16 *keys, *values;   // (count, KEY_PITCH), (8, count + 8)
    char* ring;
    const int program;
    int slots, slot = 0, layer = ENCODE, block = 0;
    u32 round = 0;

    __device__ Side(const Arguments& of, char* memory)
        : of(of), shared(*reinterpret_cast<Shared*>(memory)),
          keys(reinterpret_cast<bf16*>(memory + after_shared())),
          values(keys + of.count * KEY_PITCH),
          ring(memory + after_shared() + context_bytes(of.count)), program(blockIdx.x),
          slots(min(MOST_SLOTS,
                    (int)(MEMORY - after_shared() - context_bytes(of.count)) / SLOT)) {}

    __device__ void next_slot() {
        if (++slot == slots) slot = 0, round ^= 1;
    }

    __device__ bool next_layer() {   // false after the last, which is one program's
        if (layer == MLP && ++block < BLOCKS) layer = QKV;
        else ++layer;
        return layer < (program ? DECODE_OUT : DECODE_OUT + 1);
    }

    __device__ int tiles() const {   // of this program in a layer
        if (layer == QKV) return 3;
        if (layer == GATE) return 2 * parts(HIDDEN / 8 - program, PROGRAMS);
        if (layer == DECODE_OUT) return ACTION_TILES;
        return layer >= DECODE_IN ? parts(DECODED / 8 - program, PROGRAMS) : 1;
    }

    __device__ int depth() const {
        return layer == MLP ? HIDDEN : layer > DECODE_IN ? DECODED : WIDTH;
    }
};

// --- who fetches -------------------------------------------------------------------------------

struct Fetcher : Side {
    const int lane = threadIdx.x % 32;

    __device__ Fetcher(const Arguments& of, char* memory) : Side(of, memory) {}

    // Two arrays of constants of a block; the second may be missing.
    __device__ void part(Part kind, void* to, const bf16* from, u32 bytes, void* to_2,
                         const bf16* from_2, u32 bytes_2) {
        const u32 barrier = address(&shared.part_full[kind]);
        wait_for(address(&shared.part_empty[kind]), (block & 1) ^ 1);
        if (lane == 0) {
            expect(barrier, bytes + (from_2 ? bytes_2 : 0));
            copy(address(to), from, bytes, barrier);
            if (from_2) copy(address(to_2), from_2, bytes_2, barrier);
        }
        __syncwarp();
    }

    __device__ void shift(Part kind, int what) {
        const size_t at = block * of.modulation_block + what * of.modulation_kind;
        bf16(*to)[WIDTH] = shared.shift[kind == MLP_SHIFT];
        part(kind, to[0], of.modulation + at, WIDTH * 2, to[1], of.given ? of.clean + at : nullptr,
             WIDTH * 2);
    }

    __device__ void constants() {
        shift(ATTENTION_SHIFT, SHIFT_A);
        const u32 table = ROWS * 2 * HEAD;
        part(TABLES, shared.tables[0], of.straight + block * table, table * 2, shared.tables[1],
             of.swapped + block * table, table * 2);
        const u32 keys_of = of.count * KEY_PITCH, values_of = 8 * (of.count + 8);
        part(CONTEXT, keys, of.keys + (size_t)(block * HEADS + program / (HEAD / 8)) * keys_of,
             keys_of * 2, values, of.values + (size_t)(block * PROGRAMS + program) * values_of,
             values_of * 2);
        shift(MLP_SHIFT, SHIFT_M);
    }

    __device__ const bf16* weight() const {
        const size_t narrow = (size_t)block * WIDTH * WIDTH, wide = (size_t)block * WIDTH * HIDDEN;
        switch (layer) {
            case ENCODE: return of.encode_out;
            case QKV: return of.qkv + 3 * narrow;
            case PROJ: return of.proj + narrow;
            case QUERY: return of.query + narrow;
            case CROSS: return of.cross + narrow;
            case GATE: return of.gate_and_value + 2 * wide;
            case MLP: return of.mlp + wide;
            case DECODE_IN: return of.decode_in;
            case DECODE_MIDDLE: return of.decode_middle;
            default: return of.decode_out;
        }
    }

    __device__ int row_of(int tile) const {
        if (layer == QKV) return program * 8 + tile * WIDTH;
        if (layer == GATE) return (program + tile / 2 * PROGRAMS) * 8 + tile % 2 * HIDDEN;
        if (layer == DECODE_OUT) return tile * 8;
        return (program + tile * PROGRAMS) * 8;
    }

    __device__ void run() {
        do {
            if (layer == QKV) constants();
            const bf16* matrix = weight();
            const int all = tiles(), deep = depth();
            for (int begin = 0; begin < deep; begin += PIECE)
                for (int tile = 0; tile < all; ++tile) {
                    const int row = row_of(tile);
                    const int rows = layer == DECODE_OUT ? min(8, ACTIONS - row) : 8;
                    const u32 bytes = min(deep - begin, PIECE) * 2;
                    const u32 barrier = address(&shared.full[slot]);
                    wait_for(address(&shared.empty[slot]), round ^ 1);
                    if (lane == 0) expect(barrier, bytes * rows);
                    __syncwarp();
                    if (lane < rows)
                        copy(address(ring + slot * SLOT + lane * PITCH),
                             matrix + (size_t)(row + lane) * deep + begin, bytes, barrier);
                    next_slot();
                }
        } while (next_layer());
    }
};

// --- who computes ------------------------------------------------------------------------------

struct Program : Side {
    const int thread, warp, lane, row, t;
    const bool is_upper, is_lower;   // whether there are rows lane / 4, lane / 4 + 8
    // Of the residual stream: row thread / 8, column program * 8 + thread % 8, and what the block
    // multiplies there: gate_a, gain_m, gate_m, and gain_a of the next.
    const bool keeps;
    const int step, own;             // this row; this column
    float kept = 0.f, factors[4], next_factors[4];
    bool lost = false;               // another program does not answer

    __device__ Program(const Arguments& of, char* memory)
        : Side(of, memory), thread(threadIdx.x), warp(thread / 32), lane(thread % 32),
          row(lane / 4), t(lane % 4), is_upper(row < ROWS), is_lower(row + 8 < ROWS),
          keeps(thread < KEPT), step(thread / 8), own(program * 8 + thread % 8) {}

    // Ask until nothing is missing: ask() returns NOTHING while something is.
    template <class Ask> __device__ void until_there(Ask ask) {
        for (u32 asked = 0; ask() == NOTHING && !lost;) lost = ++asked > PATIENCE;
        __syncwarp();
    }

    __device__ void wait(Part kind) { wait_for(address(&shared.part_full[kind]), block & 1); }

    __device__ void done(Part kind) {
        __syncwarp();
        if (lane == 0) arrive(address(&shared.part_empty[kind]));
    }

    // Return when `count` programs from the first say that they have told x (ROWS, width).
    __device__ void wait_for_hints(const bf16* x, int width, int first, int count) {
        uint4 v = make_uint4(0, 0, 0, 0);
        const bf16* hints = x + ROWS * width + first * 2 + lane * 8;
        until_there([&] {
            if (lane < count / 4) v = look(hints);
            return missing(v);
        });
    }

    // Multiply what others tell with this program's tiles of a layer, into shared.sums; the last
    // rows are those of a shift. measured: find one over the lengths of its rows.
    __device__ void product(const bf16* x, int deep, int all, bool measured,
                            const bf16 (*shift)[WIDTH]) {
        constexpr int EACH = PIECE / 32 / WARPS;   // pieces of 32 of a slot that are this warp's
        if (warp == WARPS - 1) wait_for_hints(x, deep, 0, PROGRAMS);
        together();
        // Squares, and rows: one piece of the depth is asked for ahead.
        uint4 squares[2], upper[EACH], lower[EACH], next_upper[EACH], next_lower[EACH];
        const bf16* own_squares = x + ROWS * deep + HINTS + warp * PROGRAMS * 2 + lane * 8;
        auto ask_squares = [&] {
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                squares[i] = make_uint4(0, 0, 0, 0);
                if (measured && warp + i * WARPS < ROWS && lane < PROGRAMS / 4)
                    squares[i] = look(own_squares + i * WARPS * PROGRAMS * 2);
            }
        };
        const bf16* p = x + row * deep + warp * 32 + t * 8;
        auto ask = [&](int begin) {
            #pragma unroll
            for (int i = 0; i < EACH; ++i) {
                next_upper[i] = next_lower[i] = make_uint4(0, 0, 0, 0);
                if (begin + (warp + i * WARPS) * 32 >= deep) continue;
                if (is_upper) next_upper[i] = look(p + begin + i * WARPS * 32);
                if (is_lower) next_lower[i] = look(p + begin + 8 * deep + i * WARPS * 32);
            }
        };
        ask(0), ask_squares();
        #pragma unroll 1
        for (int begin = 0, place = 0; begin < deep; begin += PIECE) {
            for (u32 asked = 0;; ask(begin)) {
                u32 most = 0;
                #pragma unroll
                for (int i = 0; i < EACH; ++i)
                    most = max(most, max(missing(next_upper[i]), missing(next_lower[i])));
                if (most != NOTHING || lost) break;
                lost = ++asked > PATIENCE;
            }
            __syncwarp();
            #pragma unroll
            for (int i = 0; i < EACH; ++i) upper[i] = next_upper[i], lower[i] = next_lower[i];
            ask(begin + PIECE);
            if (shift && (row == 7 || (row == 6 && of.given)))
                #pragma unroll
                for (int i = 0; i < EACH; ++i)
                    if ((warp + i * WARPS) * 32 < deep)
                        lower[i] = *reinterpret_cast<const uint4*>(
                            &shift[7 - row][(warp + i * WARPS) * 32 + t * 8]);
            uint4 b[EACH];
            auto weights = [&] {
                wait_for(address(&shared.full[slot]), round);
                const char* w = ring + slot * SLOT + row * PITCH + t * 16 + warp * 64;
                #pragma unroll
                for (int i = 0; i < EACH; ++i)
                    b[i] = *reinterpret_cast<const uint4*>(w + i * WARPS * 64);
            };
            weights();
            #pragma unroll 1
            for (int tile = 0; tile < all; ++tile, ++place) {
                float c[EACH][4] = {};
                #pragma unroll
                for (int i = 0; i < EACH; ++i) multiply(c[i], upper[i], lower[i], b[i]);
                __syncwarp();
                if (lane == 0) arrive(address(&shared.empty[slot]));
                next_slot();
                if (tile + 1 < all) weights();
                float2* sums = reinterpret_cast<float2*>(shared.sums + place * SUMS
                                                         + warp * LINES * 8) + t;
                #pragma unroll
                for (int j = 1; j < EACH; ++j)
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) c[0][i] += c[j][i];
                if (is_upper) sums[row * 4] = make_float2(c[0][0], c[0][1]);
                if (is_lower || row >= 6)
                    sums[(is_lower ? row + 8 : row + ROWS - 6) * 4] = make_float2(c[0][2], c[0][3]);
            }
        }
        if (measured) {
            for (u32 asked = 0; !lost; ask_squares()) {
                if (max(missing(squares[0]), missing(squares[1])) != NOTHING) break;
                lost = ++asked > PATIENCE;
            }
            __syncwarp();
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                float y = (__uint_as_float(squares[i].x) + __uint_as_float(squares[i].y))
                          + (__uint_as_float(squares[i].z) + __uint_as_float(squares[i].w));
                #pragma unroll
                for (int away = 16; away; away /= 2) y += __shfl_xor_sync(~0u, y, away);
                if (lane == 0 && warp + i * WARPS < ROWS)
                    shared.lengths[warp + i * WARPS] = rsqrtf(y / WIDTH + 1e-6f);
            }
        }
        together();
    }

    // A sum over warps, and pieces of the depth.
    __device__ float sum(int tile, int line, int column, int deep, int all) {
        float s[4] = {0.f, 0.f, 0.f, 0.f};
        const float* sums = shared.sums + tile * SUMS + line * 8 + column;
        #pragma unroll 1
        for (int begin = 0; begin < deep; begin += PIECE, sums += all * SUMS) {
            #pragma unroll
            for (int i = 0; i < WARPS; ++i) s[i % 4] += sums[i * LINES * 8];
        }
        return (s[0] + s[1]) + (s[2] + s[3]);
    }

    // Say that this program has told its part of x (ROWS, width).
    __device__ void hint(bf16* x, int width) {
        if (thread == 0) tell(reinterpret_cast<u32*>(x + ROWS * width) + program, 1);
    }

    // Tell all tiles of a layer but the residual stream's.
    __device__ void tell_tiles(bf16* out, int width, int deep, int all) {
        const int each = layer == GATE ? 2 : 1;   // gate and value
        #pragma unroll 1
        for (int first = warp * 32; first < all / each * ROWS * 8; first += THREADS) {
            const int at = first + lane, tile = at / (ROWS * 8), line = at / 8 % ROWS;
            const bool valid = tile < all / each;
            const int column = layer == QKV ? tile * WIDTH + program * 8
                                            : (program + tile * PROGRAMS) * 8;
            float x = 0.f;
            if (valid) {
                const int shifted = of.given && of.given[line] ? ROWS : ROWS + 1;
                const bf16* bias = layer == DECODE_IN ? of.offset : of.decode_middle_bias;
                const float length = layer == DECODE_MIDDLE ? 1.f : shared.lengths[line];
                #pragma unroll 1
                for (int i = each - 1; i >= 0; --i) {
                    float y = sum(each * tile + i, line, at % 8, deep, all) * length;
                    if (layer < DECODE_IN) y += sum(each * tile + i, shifted, at % 8, deep, all);
                    else y += number(bias[column + at % 8]);
                    if (layer != QKV && i == 0) y /= 1.f + __expf(-y);
                    x = i == each - 1 ? y : x * y;
                }
            }
            const float other = __shfl_down_sync(~0u, x, 1);
            if (valid && lane % 2 == 0)
                tell(out + line * width + column + at % 8, pair(x, other));
        }
        hint(out, width);
    }

    // Tell what this thread keeps a number for, (ROWS, WIDTH), and the squares of another.
    __device__ void tell_own(bf16* out, float x, float length) {
        if (warp * 32 >= KEPT) return;
        const float other = __shfl_down_sync(~0u, x, 1);
        length *= length;
        #pragma unroll
        for (int away = 1; away < 8; away *= 2) length += __shfl_xor_sync(~0u, length, away);
        if (!keeps) return;
        if (thread % 2 == 0) tell(out + step * WIDTH + own, pair(x, other));
        if (thread % 8 == 0)
            tell(reinterpret_cast<float*>(out + STREAM + HINTS) + step * PROGRAMS + program,
                 __float_as_uint(length));
        hint(out, WIDTH);
    }

    __device__ const bf16* modulation_of(int line) {
        return of.given && of.given[line] ? of.clean : of.modulation;
    }

    __device__ void ask_factors(int block) {
        if (!keeps || block >= BLOCKS) return;
        const bf16* p = modulation_of(step) + own + block * of.modulation_block;
        next_factors[0] = early(p + GATE_A * of.modulation_kind);
        next_factors[1] = early(p + GAIN_M * of.modulation_kind);
        next_factors[2] = early(p + GATE_M * of.modulation_kind);
        next_factors[3] = block + 1 < BLOCKS
            ? early(p + of.modulation_block + GAIN_A * of.modulation_kind) : 1.f;
    }

    // The first layer of the encoder, in full: it is not deep.
    __device__ void encode() {
        float x = 0.f;
        if (keeps) {
            kept = early(of.encode_out_bias + own);
            factors[3] = early(modulation_of(step) + own + GAIN_A * of.modulation_kind);
            x = early(of.encode_in_bias + own);
            #pragma unroll 1
            for (int i = 0; i < ACTIONS; ++i)
                x += rounded(of.z[step * ACTIONS + i]) * early(of.encode_in + own * ACTIONS + i);
            x = rounded(x);
            x = 0.5f * x * (1.f + erff(x * 0.70710678f));
        }
        tell_own(of.exchange + ENCODED, x, 0.f);
    }

    // Attention of this program's columns of a head to the chunk's own steps, by some warps.
    __device__ void self_attention(const bf16* qkv, bf16* out) {
        const int head = program / (HEAD / 8);
        // 8 lanes a row of q or k: a lane takes HEAD / 8 numbers and their partners, HEAD / 2 away.
        const int which = thread / 8 >= ROWS, line = thread / 8 - which * ROWS;
        const bool mine = thread / 8 < 2 * ROWS;
        constexpr int VECTORS = HEAD / 64;
        uint4 these[VECTORS], others[VECTORS];
        u32 v[4] = {0, 0, 0, 0};
        const bf16* p = qkv + line * 3 * WIDTH + which * WIDTH + head * HEAD;
        const bf16* value = qkv + 2 * WIDTH + program * 8 + row / 2 * 2;
        #pragma unroll
        for (int i = 0; i < VECTORS; ++i) these[i] = others[i] = make_uint4(0, 0, 0, 0);
        wait_for_hints(qkv, 3 * WIDTH, head * (HEAD / 8), HEAD / 8);
        until_there([&] {
            u32 most = 0;
            #pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
                const int at = (lane % 8 + i * 8) * 8, away = (at + HEAD / 2) % HEAD;
                if (mine) these[i] = look(p + at), others[i] = look(p + away);
                most = max(most, max(missing(these[i]), missing(others[i])));
            }
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 2 * t + i % 2 + i / 2 * 8;
                if (warp == 0 && key < ROWS) v[i] = look_at_one(value + key * 3 * WIDTH);
                most = max(most, v[i]);
            }
            return most;
        });
        wait(TABLES);
        float length = 0.f;
        #pragma unroll
        for (int i = 0; i < VECTORS; ++i) length += square(these[i]);
        #pragma unroll
        for (int away = 1; away < 8; away *= 2) length += __shfl_xor_sync(~0u, length, away);
        const float factor = rsqrtf(length / HEAD + 1e-6f);
        #pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int at = (lane % 8 + i * 8) * 8;
            float x[8], y[8], straight[8], swapped[8];
            if (!mine) continue;
            spread(these[i], x), spread(others[i], y);
            spread(*reinterpret_cast<const uint4*>(&shared.tables[0][line][which][at]), straight);
            spread(*reinterpret_cast<const uint4*>(&shared.tables[1][line][which][at]), swapped);
            #pragma unroll
            for (int j = 0; j < 8; ++j) x[j] = factor * (x[j] * straight[j] + y[j] * swapped[j]);
            *reinterpret_cast<uint4*>(&shared.turned[which][line][at]) = packed(x);
        }
        done(TABLES);
        together<TURNING>();
        if (warp) return;
        float c[2][4] = {};
        const uint4 zero = make_uint4(0, 0, 0, 0);
        #pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int at = i * 32 + t * 8;
            auto turned = [&](int of_what, int line, bool is) {
                return is ? *reinterpret_cast<const uint4*>(&shared.turned[of_what][line][at])
                          : zero;
            };
            const uint4 upper = turned(0, row, is_upper), lower = turned(0, row + 8, is_lower);
            multiply(c[0], upper, lower, turned(1, row, is_upper));
            multiply(c[1], upper, lower, turned(1, row + 8, is_lower));
        }
        const float scale = rsqrtf((float)HEAD);
        float largest[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int half = i / 2 % 2, key = i / 4 * 8 + 2 * t + i % 2;
            float& x = c[i / 4][i % 4];
            x = key <= row + 8 * half && key < ROWS ? x * scale : -1e30f;
            largest[half] = fmaxf(largest[half], x);
        }
        largest[0] = most_of_quad(largest[0]), largest[1] = most_of_quad(largest[1]);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int half = i / 2 % 2;
            float& x = c[i / 4][i % 4];
            x = __expf(x - largest[half]), total[half] += x;
        }
        total[0] = of_quad(total[0]), total[1] = of_quad(total[1]);
        #pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = row % 2 ? v[i] >> 16 : v[i] & 0xffff;
        float o[4] = {0.f, 0.f, 0.f, 0.f};
        multiply(o, pair(c[0][0], c[0][1]), pair(c[0][2], c[0][3]), pair(c[1][0], c[1][1]),
                 pair(c[1][2], c[1][3]), v[0] | v[1] << 16, v[2] | v[3] << 16);
        bf16* place = out + row * WIDTH + program * 8 + 2 * t;
        if (is_upper) tell(place, pair(o[0] / total[0], o[1] / total[0]));
        if (is_lower) tell(place + 8 * WIDTH, pair(o[2] / total[1], o[3] / total[1]));
        hint(out, WIDTH);
    }

    // Attention of this program's columns of a head to the context: 32 keys a warp.
    __device__ void cross_attention(const bf16* queries, bf16* out) {
        const int head = program / (HEAD / 8), warps = min(WARPS, of.count / 32);
        if (warp < warps) {
            const bf16* p = queries + row * WIDTH + head * HEAD + t * 8;
            const float* q = reinterpret_cast<const float*>(queries + STREAM + HINTS)
                             + row * PROGRAMS + head * (HEAD / 8) + t * PARTS;
            uint4 upper[PARTS], lower[PARTS];
            u32 length[2][PARTS];
            float added[4][2];
            auto ask_added = [&](int begin) {
                #pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int key = begin + j / 2 * 8 + 2 * t + j % 2;
                    added[j / 2][j % 2] = of.bias ? early(of.bias + key) : 0.f;
                }
            };
            ask_added(warp * 32);
            #pragma unroll
            for (int i = 0; i < PARTS; ++i)
                upper[i] = lower[i] = make_uint4(0, 0, 0, 0), length[0][i] = length[1][i] = 0;
            wait_for_hints(queries, WIDTH, head * (HEAD / 8), HEAD / 8);
            until_there([&] {
                u32 most = 0;
                #pragma unroll
                for (int i = 0; i < PARTS; ++i) {
                    if (is_upper) upper[i] = look(p + i * 32), length[0][i] = look_at_one(q + i);
                    if (is_lower)
                        lower[i] = look(p + 8 * WIDTH + i * 32),
                        length[1][i] = look_at_one(q + 8 * PROGRAMS + i);
                }
                #pragma unroll
                for (int i = 0; i < PARTS; ++i)
                    most = max(max(most, max(length[0][i], length[1][i])),
                               max(missing(upper[i]), missing(lower[i])));
                return most;
            });
            wait(CONTEXT);
            float factor[2];
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = 0.f;
                #pragma unroll
                for (int i = 0; i < PARTS; ++i) x += __uint_as_float(length[half][i]);
                factor[half] = rsqrtf((float)HEAD) * rsqrtf(of_quad(x) / HEAD + 1e-6f);
            }
            float o[4] = {0.f, 0.f, 0.f, 0.f}, largest[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
            #pragma unroll 1
            for (int begin = warp * 32; begin < of.count; begin += WARPS * 32) {
                float c[4][4] = {};
                if (begin >= WARPS * 32) ask_added(begin);
                #pragma unroll
                for (int i = 0; i < PARTS; ++i)
                    #pragma unroll
                    for (int j = 0; j < 4; ++j)
                        multiply(c[j], upper[i], lower[i], *reinterpret_cast<const uint4*>(
                            keys + (begin + j * 8 + row) * KEY_PITCH + i * 32 + t * 8));
                float now[2] = {largest[0], largest[1]};
                #pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int half = i / 2 % 2;
                    float& x = c[i / 4][i % 4];
                    x = fmaxf(x * factor[half] + added[i / 4][i % 2], -1e30f);
                    now[half] = fmaxf(now[half], x);
                }
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    now[half] = most_of_quad(now[half]);
                    const float past = __expf(largest[half] - now[half]);
                    total[half] *= past, o[2 * half] *= past, o[2 * half + 1] *= past;
                    largest[half] = now[half];
                }
                #pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int half = i / 2 % 2;
                    float& x = c[i / 4][i % 4];
                    x = __expf(x - now[half]), total[half] += x;
                }
                #pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const bf16* v = values + row * (of.count + 8) + begin + j * 8 + 2 * t;
                    multiply(o, pair(c[j][0], c[j][1]), pair(c[j][2], c[j][3]),
                             pair(c[j + 1][0], c[j + 1][1]), pair(c[j + 1][2], c[j + 1][3]),
                             *reinterpret_cast<const u32*>(v),
                             *reinterpret_cast<const u32*>(v + 8));
                }
            }
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int line = row + 8 * half;
                total[half] = of_quad(total[half]);
                *reinterpret_cast<float2*>(&shared.attended[warp][line][2 * t])
                    = make_float2(o[2 * half], o[2 * half + 1]);
                if (t == 0) shared.weights[warp][line] = make_float2(largest[half], total[half]);
            }
        }
        done(CONTEXT);
        together();
        float x = 0.f;
        if (keeps) {
            float most = -1e30f, above = 0.f, below = 0.f;
            #pragma unroll 1
            for (int i = 0; i < warps; ++i) {
                const float2 w = shared.weights[i][step];
                const float now = fmaxf(most, w.x), past = __expf(most - now);
                const float part = __expf(w.x - now);
                above = above * past + part * shared.attended[i][step][thread % 8];
                below = below * past + part * w.y, most = now;
            }
            x = above / below;
        }
        tell_own(out, x, 0.f);
    }

    __device__ void run() {
        ask_factors(0);
        encode();
        #pragma unroll 1
        do {
            bf16* place = of.exchange + (size_t)block * OF_BLOCK;
            const bf16* x = place;
            switch (layer) {
                case ENCODE: x = of.exchange + ENCODED; break;
                case QKV: x = block ? x - OF_BLOCK + X3 : of.exchange + X0; break;
                case PROJ: x += ATTENDED; break;
                case QUERY: x += X1; break;
                case CROSS: x += CROSSED; break;
                case GATE: x += X2; break;
                case MLP: x += MIDDLE; break;
                case DECODE_IN: x += X3 - OF_BLOCK; break;
                case DECODE_MIDDLE: x = of.exchange + FIRST; break;
                default: x = of.exchange + SECOND;
            }
            if (layer == QKV) {
                #pragma unroll
                for (int i = 0; i < 4; ++i) factors[i] = next_factors[i];
                ask_factors(block + 1);
                wait(ATTENTION_SHIFT);
            }
            if (layer == GATE) wait(MLP_SHIFT);
            const bool shifted = layer == QKV || layer == GATE;
            const int deep = depth(), all = tiles();
            product(x, deep, all, shifted || layer == QUERY || layer == DECODE_IN,
                    shifted ? shared.shift[layer == GATE] : nullptr);
            if (layer == QKV) done(ATTENTION_SHIFT);
            if (layer == GATE) done(MLP_SHIFT);
            if (layer == ENCODE || layer == PROJ || layer == CROSS || layer == MLP) {
                float gate = 1.f, gain = 1.f;
                if (layer == PROJ) gate = factors[0];
                if (layer == CROSS) gain = factors[1];
                if (layer == MLP) gate = factors[2];
                if (layer == MLP || layer == ENCODE) gain = factors[3];
                if (keeps) kept += gate * sum(0, step, thread % 8, deep, all);
                bf16* out = place + (layer == PROJ ? X1 : layer == CROSS ? X2 : X3);
                if (layer == ENCODE) out = of.exchange + X0;
                tell_own(out, kept * gain, kept);
            } else if (layer == QUERY) {
                const float y = keeps
                    ? rounded(sum(0, step, thread % 8, deep, all) * shared.lengths[step]) : 0.f;
                tell_own(place + QUERY_AT, y, y);
                cross_attention(place + QUERY_AT, place + CROSSED);
            } else if (layer != DECODE_OUT) {
                bf16* out = layer == QKV ? place + QKV_AT : layer == GATE ? place + MIDDLE
                            : of.exchange + (layer == DECODE_IN ? FIRST : SECOND);
                tell_tiles(out, layer == QKV ? 3 * WIDTH : layer == GATE ? HIDDEN : DECODED, deep,
                           all);
                if (layer == QKV && warp < TURNING)
                    self_attention(place + QKV_AT, place + ATTENDED);
            } else {
                for (int at = thread; at < ROWS * ACTIONS; at += THREADS) {
                    const int line = at / ACTIONS, action = at % ACTIONS;
                    const float y = sum(action / 8, line, action % 8, deep, all)
                                    + number(of.decode_out_bias[action]);
                    of.velocity[at] = lost ? __uint_as_float(0x7fc00000) : rounded(y);
                }
            }
        } while (next_layer());
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
velocity(const __grid_constant__ Arguments of) {
    extern __shared__ __align__(128) char memory[];
    if (threadIdx.x == 0) {
        Shared& shared = *reinterpret_cast<Shared*>(memory);
        auto begin = [](unsigned long long& barrier, int count) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                         ::"r"(address(&barrier)), "r"(count));
        };
        for (int i = 0; i < MOST_SLOTS; ++i)
            begin(shared.full[i], 1), begin(shared.empty[i], WARPS);
        for (int i = 0; i < KINDS; ++i)
            begin(shared.part_full[i], 1),
            begin(shared.part_empty[i], i == TABLES ? TURNING : WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // Rows that are less deep than a slot are zero beyond; what they meet there must be a number.
    for (u32 at = after_shared() + threadIdx.x * 16; at < MEMORY; at += blockDim.x * 16)
        *reinterpret_cast<uint4*>(memory + at) = make_uint4(0, 0, 0, 0);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x >= THREADS) Fetcher(of, memory).run();
    else Program(of, memory).run();
}
