// Bank conflicts: 32 banks of 4 bytes; lanes that meet in a bank with different words take one pass each. An
// access of 16 bytes a lane is done for 8 lanes at a time, of 8 bytes for 16.
//
// ldmatrix is a collective: its matrices are counted where it is executed. Plain accesses and cp.async are
// not, so the n-th execution of a call site by each lane of a warp is taken as one instruction.
#include "engine.h"

#include <algorithm>
#include <stdio.h>

enum { SITES = 1 << 14, BLOCKS = 16 }; // plain accesses: of the first blocks of a launch
struct named_site {
    emu_site site;
    bool used;
};
static named_site sites[SITES];

int emu_site_id(emu_site site) {
    const uint64_t hash = ((uint64_t)(uintptr_t)site.file + (uint64_t)site.line * 0x9E3779B97F4A7C15ull) *
                          0xD1B54A32D192ED03ull;
    for (uint32_t i = 0, at = (uint32_t)(hash >> 50); i < 64; i++, at = (at + 1) % SITES) {
        if (!sites[at].used) {
            sites[at].used = true;
            sites[at].site = site;
        }
        if (sites[at].site.file == site.file && sites[at].site.line == site.line) {
            return (int)at;
        }
    }
    return 0;
}

emu_site emu_site_of(int id) {
    return sites[id].site;
}

// ---- one instruction of one warp
struct instruction {
    uint32_t lanes, offset[32];
};

static void count(const instruction *in, int bytes, uint64_t *ideal, uint64_t *wavefronts) {
    const int unit = bytes < 4 ? 4 : bytes, banks = 128 / unit,
              lanes_at_once = bytes == 16  ? 8
                              : bytes == 8 ? 16
                                           : 32;
    for (int first = 0; first < 32; first += lanes_at_once) {
        uint32_t word[32][32];
        int words[32] = {0}, worst = 0;
        for (int lane = first; lane < first + lanes_at_once; lane++) {
            if (!(in->lanes >> lane & 1)) {
                continue;
            }
            const uint32_t w = in->offset[lane] / (uint32_t)unit, bank = w % (uint32_t)banks;
            if (std::find(word[bank], word[bank] + words[bank], w) == word[bank] + words[bank]) {
                word[bank][words[bank]++] = w;
                worst = std::max(worst, words[bank]);
            }
        }
        *ideal += worst > 0;
        *wavefronts += (uint64_t)worst;
    }
}

// ---- the executions of one call site by one warp
struct executions {
    uint32_t lane_count[32], first; // how often each lane was here; number of the first open instruction
    std::vector<instruction> open;
};
struct site_traffic {
    int site, bytes;
    enum emu_traffic traffic;
    uint64_t ideal, wavefronts;
    executions warp[EMU_MAX_WARPS];
};
static std::vector<site_traffic *> traffic_of; // by site
static std::vector<site_traffic *> all_traffic;
static uint64_t matrices[SITES], matrix_wavefronts[SITES];

static void close(site_traffic *t, const instruction *in) {
    uint64_t ideal = 0, wavefronts = 0;
    count(in, t->bytes, &ideal, &wavefronts);
    t->ideal += ideal;
    t->wavefronts += wavefronts;
    (t->traffic == EMU_TRAFFIC_READ    ? emu_counts.read_ideal
     : t->traffic == EMU_TRAFFIC_WRITE ? emu_counts.write_ideal
                                       : emu_counts.copy_ideal) += ideal;
    (t->traffic == EMU_TRAFFIC_READ    ? emu_counts.read_wavefronts
     : t->traffic == EMU_TRAFFIC_WRITE ? emu_counts.write_wavefronts
                                       : emu_counts.copy_wavefronts) += wavefronts;
}

void emu_conflict_note(uint32_t offset, int bytes, enum emu_traffic traffic, emu_site site) {
    if (emu_b.serial - emu_launch_serial >= BLOCKS) {
        return;
    }
    const int id = emu_site_id(site);
    if (traffic_of.empty()) {
        traffic_of.resize(SITES);
    }
    site_traffic *t = traffic_of[(size_t)id];
    if (!t) {
        t = traffic_of[(size_t)id] = new site_traffic();
        t->site = id;
        all_traffic.push_back(t);
    }
    t->bytes = bytes;
    t->traffic = traffic;
    const emu_fiber *f = emu_me();
    executions *e = &t->warp[f->warp];
    const uint32_t i = e->lane_count[f->lane]++ - e->first;
    if (e->open.size() <= i) {
        e->open.resize(i + 1);
    }
    e->open[i].lanes |= 1u << f->lane;
    e->open[i].offset[f->lane] = offset;
    if (i == e->open.size() - 1 && e->open[i].lanes == emu_lanes_of(f->warp)) { // then so are all before it
        for (const instruction &in : e->open) {
            close(t, &in);
        }
        e->first += (uint32_t)e->open.size();
        e->open.clear();
    }
}

void emu_conflict_end_block() {
    for (site_traffic *t : all_traffic) {
        for (int w = 0; w < emu_b.n_warps; w++) {
            executions *e = &t->warp[w];
            for (const instruction &in : e->open) {
                close(t, &in);
            }
            e->open.clear();
            e->first = 0;
            memset(e->lane_count, 0, sizeof e->lane_count);
        }
    }
}

void emu_conflict_matrix(int wavefronts, emu_site site) {
    const int id = emu_site_id(site);
    matrices[id]++;
    matrix_wavefronts[id] += (uint64_t)wavefronts;
    emu_counts.ldmatrix++;
    emu_counts.ldmatrix_wavefronts += (uint64_t)wavefronts;
}

void emu_conflict_clear() {
    for (site_traffic *t : all_traffic) {
        traffic_of[(size_t)t->site] = NULL;
        delete t;
    }
    all_traffic.clear();
    memset(matrices, 0, sizeof matrices);
    memset(matrix_wavefronts, 0, sizeof matrix_wavefronts);
}

int emu_conflicts(char *text, int bytes) {
    static const char *const names[] = {"ld.shared", "st.shared", "cp.async"};
    int n = 0, used = 0;
    if (bytes > 0) {
        text[0] = 0;
    }
    const auto line = [&](const char *what, int site, uint64_t ideal, uint64_t wavefronts) {
        if (wavefronts > ideal) {
            n++;
            if (used < bytes) {
                used += snprintf(text + used, (size_t)(bytes - used),
                                 "%s: %s: %.3f wavefronts for each that it needs\n",
                                 emu_site_text(emu_site_of(site)), what, (double)wavefronts / (double)ideal);
            }
        }
    };
    for (const site_traffic *t : all_traffic) {
        line(names[t->traffic], t->site, t->ideal, t->wavefronts);
    }
    for (int id = 0; id < SITES; id++) {
        line("ldmatrix", id, matrices[id], matrix_wavefronts[id]);
    }
    return n;
}
