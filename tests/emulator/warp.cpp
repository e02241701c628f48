// Shuffles, votes and integer reductions of a warp.
#include "engine.h"

int emu_lane() {
    return emu_me()->lane;
}

template <class T> static T *operand(int warp, uint32_t lane) {
    return (T *)emu_at(warp, (int)lane)->op.arg;
}

struct shuffle_operand {
    uint32_t value, result;
    enum emu_shuffle_mode mode;
    int by, width;
};

// The lane that lane reads from, itself where there is none.
static int source_of(const shuffle_operand *o, int lane) {
    const int first = lane / o->width * o->width;
    const int source = o->mode == EMU_SHUFFLE_IDX   ? first + (o->by & (o->width - 1))
                       : o->mode == EMU_SHUFFLE_XOR ? lane ^ o->by
                       : o->mode == EMU_SHUFFLE_UP  ? lane - o->by
                                                    : lane + o->by;
    return source < first || source >= first + o->width ? lane : source;
}

static void run_shuffle(int warp, uint32_t mask) {
    EMU_EACH_LANE(lane, mask) {
        shuffle_operand *o = operand<shuffle_operand>(warp, lane);
        const int source = source_of(o, (int)lane);
        if (!(mask >> source & 1)) {
            emu_fail(emu_at(warp, (int)lane)->op.site,
                     "shuffle from lane %d, which is not in the mask 0x%08x", source, mask);
        }
        o->result = operand<shuffle_operand>(warp, (uint32_t)source)->value;
    }
}

uint32_t emu_shuffle(uint32_t mask, uint32_t value, enum emu_shuffle_mode mode, int by, int width,
                     emu_site site) {
    if (width < 1 || width > 32 || (width & (width - 1))) {
        emu_fail(site, "shuffle of width %d", width);
    }
    shuffle_operand o = {value, 0, mode, by, width};
    emu_collective(EMU_SHUFFLES, mask, &o, run_shuffle, site);
    return o.result;
}

struct vote_operand {
    uint32_t value, result;
    enum emu_vote vote;
};

static void run_vote(int warp, uint32_t mask) {
    uint32_t ballot = 0;
    EMU_EACH_LANE(lane, mask) {
        ballot |= (uint32_t)(operand<vote_operand>(warp, lane)->value != 0) << lane;
    }
    EMU_EACH_LANE(lane, mask) {
        vote_operand *o = operand<vote_operand>(warp, lane);
        o->result = o->vote == EMU_BALLOT ? ballot : o->vote == EMU_ANY ? ballot != 0 : ballot == mask;
        if (o->vote == EMU_MATCH_ANY) {
            o->result = 0;
            EMU_EACH_LANE(other, mask) {
                o->result |= (uint32_t)(operand<vote_operand>(warp, other)->value == o->value) << other;
            }
        }
    }
}

uint32_t emu_vote(uint32_t mask, uint32_t value, enum emu_vote vote, emu_site site) {
    vote_operand o = {value, 0, vote};
    emu_collective(EMU_VOTES, mask, &o, run_vote, site);
    return o.result;
}

// ---- one step of a reduction; atomics take it too
uint32_t emu_combine(uint32_t a, uint32_t b, enum emu_reduction op, bool is_signed) {
    const bool less = is_signed ? (int32_t)a < (int32_t)b : a < b;
    switch (op) {
    case EMU_ADD:
        return a + b;
    case EMU_MIN:
        return less ? a : b;
    case EMU_MAX:
        return less ? b : a;
    case EMU_AND:
        return a & b;
    case EMU_OR:
        return a | b;
    case EMU_XOR:
        return a ^ b;
    case EMU_EXCHANGE:
    case EMU_CAS:
        break;
    }
    return b;
}

struct reduce_operand {
    uint32_t value;
    enum emu_reduction op;
    bool is_signed;
};

static void run_reduce(int warp, uint32_t mask) {
    const uint32_t first = (uint32_t)__builtin_ctz(mask);
    const reduce_operand *o = operand<reduce_operand>(warp, first);
    uint32_t sum = o->value;
    EMU_EACH_LANE(lane, mask & (mask - 1)) {
        sum = emu_combine(sum, operand<reduce_operand>(warp, lane)->value, o->op, o->is_signed);
    }
    EMU_EACH_LANE(lane, mask) {
        operand<reduce_operand>(warp, lane)->value = sum;
    }
}

uint32_t emu_warp_reduce(uint32_t mask, uint32_t value, enum emu_reduction op, bool is_signed,
                         emu_site site) {
    reduce_operand o = {value, op, is_signed};
    emu_collective(EMU_REDUCES, mask, &o, run_reduce, site);
    return o.value;
}
