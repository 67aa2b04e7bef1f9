// The machine the emulated kernels run on: lanes as fibers, simdgroups of 32, barriers, and the
// checks behind every load and store (hooks that clang's thread sanitizer pass calls).
//
// One OS thread; threadgroups one after the other. A lane runs until it parks at a collective, at a
// barrier or at its end; a collective runs once for all lanes of the simdgroup that stand there.
// Races: the same byte, two threads, one of them writing, and no barrier between them. What orders
// two accesses: a threadgroup_barrier for that memory, or, inside a simdgroup, a simdgroup_barrier
// for it. Collectives order nothing. The rule does not depend on the schedule that was run.
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace {
constexpr int kMaxLanes = 1024, kSlots = 40;
constexpr size_t kSlot = size_t(1) << 30, kStack = 256 << 10, kRedZone = 64;
constexpr size_t kThreadgroupBytes = 1 << 20, kThreadgroupLimit = 32768;
enum State { kReady, kCollective, kBarrier, kDone };
enum Mode { kCheck = 1, kCount = 2 };

struct Ids { uint32_t v[13][3]; };
struct Lane {
  void* stack_pointer;
  State state;
  uint64_t site;
  void* io;
  void (*run)(void**, uint32_t);
  int flags;
  Ids ids;
};
struct Report { char kind[24]; uint64_t where; int is_site, slot; int64_t offset; int size, lane, other; uint32_t group[3]; };
struct Counters { uint64_t read_bytes, written_bytes, unique_read, unique_written, read_lines, read_lines_cached, written_lines, minimum_lines; };
struct Shadow { std::vector<uint64_t> writer, reader, reader2; };
struct Access { uint32_t order; int slot, size; uint64_t offset; bool write; };

char* arena;
size_t slot_size[kSlots];
bool slot_writable[kSlots], slot_used[kSlots], slot_opened[kSlots];
Shadow shadow[kSlots];
Counters counters[kSlots];
std::vector<uint8_t> touched[kSlots];  // bit 0 read, bit 1 written
std::vector<uint8_t> tg_valid(kThreadgroupBytes);
std::unordered_map<int, size_t> tg_offset;
size_t tg_used, tg_declared;
std::vector<Report> reports;
uint64_t report_total;

char* stacks;
Lane lanes[kMaxLanes];
int lane_count, current, mode;
void* scheduler_stack;
void (*entry)(void**, const Ids*);
void** entry_buffers;
uint64_t generation, switches;
uint32_t epoch[2], simd_epoch[2][32], group_position[3];
int lane_schedule[kMaxLanes];
std::vector<Access> log_[32];
std::unordered_map<uint64_t, uint32_t> occurrences[kMaxLanes], orders[32];
// A model of the first-level cache: the last few lines a simdgroup read.
constexpr int kCachedLines = 8;
uint64_t cached[32][kCachedLines];

extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void report(const char* kind, uint64_t where, int is_site, int slot, int64_t offset, int size, int other) {
  report_total++;
  for (auto& r : reports)
    if (!strcmp(r.kind, kind) && r.where == where && r.slot == slot) return;
  if (reports.size() >= 64) return;
  Report r = {};
  snprintf(r.kind, sizeof r.kind, "%s", kind);
  r.where = where; r.is_site = is_site; r.slot = slot; r.offset = offset; r.size = size;
  r.lane = current; r.other = other;
  memcpy(r.group, group_position, sizeof r.group);
  reports.push_back(r);
}

// A shadow entry: generation (one a threadgroup) 22 | lane 10 | epoch 16 | simdgroup epoch 16.
uint64_t stamp(int device_memory) {
  return (generation << 42) | (uint64_t(current) << 32) | (uint64_t(epoch[device_memory] & 0xffff) << 16) |
         (simd_epoch[device_memory][current / 32] & 0xffff);
}
bool unordered(uint64_t entry_, uint64_t now, bool device_memory) {
  if (!entry_) return false;
  if (entry_ >> 42 != now >> 42) return device_memory;  // another threadgroup: nothing orders them
  int other = entry_ >> 32 & 1023, mine = now >> 32 & 1023;
  if (other == mine) return false;
  if ((entry_ >> 16 & 0xffff) != (now >> 16 & 0xffff)) return false;
  return !(other / 32 == mine / 32 && (entry_ & 0xffff) != (now & 0xffff));
}

// The nth time a lane comes to an instruction between two synchronisations, it runs it together with
// the nth time of its neighbours: that is one load of the whole simdgroup.
void log_access(int slot, size_t offset, int size, bool write, uint64_t pc) {
  int simdgroup = current / 32;
  uint32_t occurrence = occurrences[current][pc]++;
  auto& order = orders[simdgroup];
  auto found = order.emplace(pc * 65536 + occurrence, uint32_t(order.size())).first;
  log_[simdgroup].push_back({found->second, slot, size, offset, write});
}

void read_line(int simdgroup, int slot, uint64_t line) {
  uint64_t key = (uint64_t(slot) << 40 | line) + 1;
  auto* lines = cached[simdgroup];
  int at = 0;
  while (at < kCachedLines - 1 && lines[at] != key) at++;
  if (lines[at] != key) counters[slot].read_lines_cached++;
  for (; at > 0; at--) lines[at] = lines[at - 1];
  lines[0] = key;
}

void flush_log(int simdgroup) {
  auto& all = log_[simdgroup];
  std::sort(all.begin(), all.end(), [](const Access& a, const Access& b) {
    return a.order != b.order ? a.order < b.order : a.offset < b.offset;
  });
  uint32_t order = ~0u;
  uint64_t end = 0, next_line = 0;
  for (auto& a : all) {
    if (a.order != order) end = next_line = 0;
    order = a.order;
    auto& c = counters[a.slot];
    uint64_t from = std::max(a.offset, end), to = a.offset + a.size;
    if (to > from) (a.write ? c.written_bytes : c.read_bytes) += to - from;
    end = std::max(end, to);
    for (uint64_t line = std::max(a.offset / 128, next_line); line <= (to - 1) / 128; line++) {
      (a.write ? c.written_lines : c.read_lines)++;
      if (!a.write) read_line(simdgroup, a.slot, line);
      next_line = line + 1;
    }
  }
  all.clear();
  orders[simdgroup].clear();
  for (int i = simdgroup * 32; i < simdgroup * 32 + 32; i++) occurrences[i].clear();
}

void access(uintptr_t address, int size, bool write, bool aligned, uint64_t pc) {
  if (address - (uintptr_t)arena >= kSlot * kSlots) return;  // a lane's own stack, or the library
  size_t relative = address - (uintptr_t)arena;
  int slot = relative >> 30;
  size_t offset = relative & (kSlot - 1);
  if (!slot_used[slot] || offset + size > slot_size[slot]) {
    // Reported; the access itself must not end the process.
    mprotect(arena + relative / 4096 * 4096, 8192, PROT_READ | PROT_WRITE);
    slot_opened[slot] = true;
    // Just below a buffer's start is the end of the slot before.
    if (offset + (1 << 20) > kSlot && slot + 1 < kSlots) return report(write ? "OOB write" : "OOB read", pc, 0, slot + 1, int64_t(offset) - int64_t(kSlot), size, -1);
    return report(write ? "OOB write" : "OOB read", pc, 0, slot, offset, size, -1);
  }
  if (aligned && size > 1 && address % std::min(size, 16)) report("MISALIGNED", pc, 0, slot, offset, size, -1);
  if (mode & kCount) {
    uint8_t bit = write ? 2 : 1;
    for (int i = 0; i < size; i++) touched[slot][offset + i] |= bit;
    if (slot) log_access(slot, offset, size, write, pc);
  }
  if (!(mode & kCheck)) return;
  if (slot == 0)
    for (int i = 0; i < size; i++)
      if (!tg_valid[offset + i]) return report(write ? "OOB-TG write" : "OOB-TG read", pc, 0, 0, offset, size, -1);
  if (slot && !slot_writable[slot]) {
    if (write) report("WRITE to an input", pc, 0, slot, offset, size, -1);
    return;
  }
  auto& s = shadow[slot];
  uint64_t now = stamp(slot != 0);
  for (int i = 0; i < size; i++) {
    uint64_t &w = s.writer[offset + i], &r = s.reader[offset + i], &r2 = s.reader2[offset + i];
    bool fresh = slot ? w != 0 : (w >> 42 == generation);
    if (!write && !fresh) report(slot ? "UNINIT device" : "UNINIT", pc, 0, slot, offset, size, -1);
    if (unordered(w, now, slot != 0)) report(slot ? "RACE-DEV" : "RACE", pc, 0, slot, offset, size, w >> 32 & 1023);
    if (write) {
      if (unordered(r, now, slot != 0)) report(slot ? "RACE-DEV" : "RACE", pc, 0, slot, offset, size, r >> 32 & 1023);
      if (unordered(r2, now, slot != 0)) report(slot ? "RACE-DEV" : "RACE", pc, 0, slot, offset, size, r2 >> 32 & 1023);
      w = now;
      r = r2 = 0;
    } else if (!r || r >> 42 != generation || (r >> 32 & 1023) == uint64_t(current)) {
      r = now;
    } else {
      r2 = now;
    }
  }
}

void park(State state, uint64_t site) {
  Lane& lane = lanes[current];
  lane.state = state;
  lane.site = site;
  switches++;
  emu_switch(&lane.stack_pointer, scheduler_stack);
}

void lane_main() {
  entry(entry_buffers, &lanes[current].ids);
  park(kDone, 0);
}

void start_lane(int i) {
  uintptr_t top = (uintptr_t)(stacks + size_t(i + 1) * kStack) - 64 - size_t(i % 16) * 192;
  void** p = (void**)(top & ~uintptr_t(15));
  *--p = nullptr;
  *--p = (void*)lane_main;
  for (int k = 0; k < 6; k++) *--p = nullptr;
  lanes[i].stack_pointer = p;
  lanes[i].state = kReady;
}

void resume(int i) {
  current = i;
  emu_switch(&scheduler_stack, lanes[i].stack_pointer);
}

void advance(int flags, int simdgroup) {
  for (int m = 0; m < 2; m++)
    if (flags >> m & 1) {
      // flags: bit 0 device memory (epoch 1), bit 1 threadgroup memory (epoch 0)
      int which = m == 0;
      if (simdgroup < 0) {
        epoch[which]++;
        for (auto& e : simd_epoch[which]) e++;
      } else {
        simd_epoch[which][simdgroup]++;
      }
    }
}

// Run one simdgroup until all its lanes are done or wait at a threadgroup barrier.
void run_simdgroup(int g) {
  int first = g * 32, last = std::min(first + 32, lane_count);
  for (;;) {
    for (int k = 0; k < 32; k++) {
      int i = first + lane_schedule[k];
      if (i < last && lanes[i].state == kReady) resume(i);
    }
    uint32_t mask = 0;
    int leader = -1, elsewhere = 0;
    for (int i = first; i < last; i++)
      if (lanes[i].state == kCollective && (leader < 0 || lanes[i].site < lanes[leader].site)) leader = i;
    if (leader < 0) break;
    void* io[32] = {};
    for (int i = first; i < last; i++) {
      if (lanes[i].state == kCollective && lanes[i].site == lanes[leader].site) {
        mask |= 1u << (i - first);
        io[i - first] = lanes[i].io;
      } else {
        elsewhere++;
      }
    }
    current = leader;
    if (elsewhere) report("DIVERGENT", lanes[leader].site, 1, -1, last - first - elsewhere, last - first, -1);
    if (lanes[leader].run) lanes[leader].run(io, mask);
    else advance(lanes[leader].flags, g);
    if (mode & kCount) flush_log(g);
    for (int i = first; i < last; i++)
      if (mask >> (i - first) & 1) lanes[i].state = kReady;
  }
  if (mode & kCount) flush_log(g);
}

void run_threadgroup(uint32_t seed) {
  int groups = (lane_count + 31) / 32;
  std::vector<int> order(groups);
  for (int g = 0; g < groups; g++) order[g] = seed % 2 ? groups - 1 - g : g;
  for (;;) {
    for (int g : order) run_simdgroup(g);
    int leader = -1, same = 0;
    for (int i = 0; i < lane_count; i++)
      if (lanes[i].state == kBarrier) {
        if (leader < 0) leader = i;
        same += lanes[i].site == lanes[leader].site;
      }
    if (leader < 0) return;
    current = leader;
    if (same != lane_count) report("BARRIER", lanes[leader].site, 1, -1, same, lane_count, -1);
    advance(lanes[leader].flags, -1);
    for (int i = 0; i < lane_count; i++)
      if (lanes[i].state == kBarrier) lanes[i].state = kReady;
  }
}
}  // namespace

extern "C" {
uint32_t emu_lane_order[32];

uint32_t emu_lane() { return current % 32; }

void* emu_threadgroup(int id, size_t size, size_t align) {
  auto found = tg_offset.find(id);
  if (found == tg_offset.end()) {
    size_t at = (tg_used + kRedZone + align - 1) / align * align;
    tg_used = at + size;
    tg_declared += size;
    if (tg_used + kRedZone > kThreadgroupBytes) { tg_used = at; at = 0; }
    memset(&tg_valid[at], 1, size);
    found = tg_offset.emplace(id, at).first;
    if (tg_declared > kThreadgroupLimit) report("TGMEM", 0, 1, 0, tg_declared, kThreadgroupLimit, -1);
  }
  return arena + found->second;
}
void emu_barrier(int d, int t, uint64_t site) {
  lanes[current].flags = d | t << 1;
  park(kBarrier, site);
}
void emu_simdgroup_barrier(int d, int t, uint64_t site) {
  lanes[current].flags = d | t << 1;
  lanes[current].run = nullptr;
  park(kCollective, site);
}
void emu_collective(uint64_t site, void* io, void (*run)(void**, uint32_t)) {
  lanes[current].io = io;
  lanes[current].run = run;
  park(kCollective, site);
}
void emu_poison(uint64_t site) { report("SHUFFLE", site, 1, -1, 0, 0, -1); }
void emu_atomic(void* address, void* value, size_t size, int write) {
  if (write) {
    memcpy(address, value, size);
    size_t relative = (char*)address - arena;
    int slot = relative >> 30;
    if (mode & kCheck) for (size_t i = 0; i < size; i++) shadow[slot].writer[(relative & (kSlot - 1)) + i] = stamp(slot != 0) | uint64_t(0);
  } else {
    memcpy(value, address, size);
  }
}

// float to bfloat16, to nearest even; no library here has it.
__bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t high = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40
                                                   : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 result;
  memcpy(&result, &high, 2);
  return result;
}

// ---- called by the driver --------------------------------------------------------------------
void emu_reset() {
  if (!arena) {
    arena = (char*)mmap(nullptr, kSlot * kSlots, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = (char*)mmap(nullptr, kMaxLanes * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  for (int s = 0; s < kSlots; s++) {
    if (slot_used[s] || slot_opened[s]) {
      madvise(arena + s * kSlot, kSlot, MADV_DONTNEED);
      mprotect(arena + s * kSlot, kSlot, PROT_NONE);
    }
    slot_used[s] = slot_opened[s] = false;
    slot_size[s] = 0;
    shadow[s] = {};
    touched[s].clear();
    counters[s] = {};
  }
  reports.clear();
  report_total = 0;
  tg_offset.clear();
  tg_used = tg_declared = 0;
  std::fill(tg_valid.begin(), tg_valid.end(), 0);
}

void* emu_buffer(int slot, size_t size, int writable) {
  // A page more than the buffer, so that a plain run survives a small overrun.
  mprotect(arena + slot * kSlot, (size + 8191) / 4096 * 4096, PROT_READ | PROT_WRITE);
  slot_used[slot] = true;
  slot_size[slot] = size;
  slot_writable[slot] = writable;
  return arena + slot * kSlot;
}

void emu_launch(void (*kernel)(void**, const Ids*), void** buffers, const uint32_t* grid,
                const uint32_t* group, int mode_, uint32_t seed) {
  entry = kernel;
  entry_buffers = buffers;
  mode = mode_;
  switches = 0;
  emu_buffer(0, kThreadgroupBytes, 1);
  slot_size[0] = kThreadgroupBytes;
  for (int s = 0; s < kSlots; s++) {
    if (!slot_used[s]) continue;
    if (mode & kCheck && (s == 0 || slot_writable[s]))
      for (auto* v : {&shadow[s].writer, &shadow[s].reader, &shadow[s].reader2}) v->assign(slot_size[s], 0);
    if (mode & kCount) touched[s].assign(slot_size[s], 0);
  }
  uint32_t random = seed * 2654435761u + 1;
  for (int i = 0; i < 32; i++) lane_schedule[i] = emu_lane_order[i] = i;
  if (seed == 1) std::reverse(emu_lane_order, emu_lane_order + 32);
  if (seed > 1)
    for (int i = 31; i > 0; i--) {
      random = random * 1664525u + 1013904223u;
      std::swap(lane_schedule[i], lane_schedule[(random >> 16) % (i + 1)]);
    }
  if (seed > 1) std::copy(lane_schedule, lane_schedule + 32, emu_lane_order);
  uint32_t groups[3];
  for (int a = 0; a < 3; a++) groups[a] = (grid[a] + group[a] - 1) / group[a];
  generation = 0;
  for (uint32_t z = 0; z < groups[2]; z++)
    for (uint32_t y = 0; y < groups[1]; y++)
      for (uint32_t x = 0; x < groups[0]; x++) {
        uint32_t at[3] = {x, y, z}, size[3];
        memcpy(group_position, at, sizeof at);
        for (int a = 0; a < 3; a++) size[a] = std::min(group[a], grid[a] - at[a] * group[a]);
        lane_count = size[0] * size[1] * size[2];
        generation++;
        epoch[0] = epoch[1] = 0;
        memset(simd_epoch, 0, sizeof simd_epoch);
        memset(cached, 0, sizeof cached);
        memset(arena, 0xff, std::min(kThreadgroupBytes, tg_used + kRedZone + 32768));
        for (int i = 0; i < lane_count; i++) {
          uint32_t local[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
          auto& v = lanes[i].ids.v;
          for (int a = 0; a < 3; a++) {
            v[0][a] = at[a] * group[a] + local[a];
            v[1][a] = local[a];
            v[2][a] = at[a];
            v[3][a] = grid[a];
            v[4][a] = size[a];
            v[5][a] = groups[a];
            v[11][a] = group[a];
          }
          v[6][0] = i % 32;
          v[7][0] = i / 32;
          v[8][0] = i;
          v[9][0] = (lane_count + 31) / 32;
          v[10][0] = 32;
          start_lane(i);
        }
        run_threadgroup(seed);
      }
}

int emu_reports(Report* out, int capacity) {
  int n = std::min<int>(capacity, reports.size());
  memcpy(out, reports.data(), n * sizeof(Report));
  return reports.size();
}
uint64_t emu_threadgroup_bytes() { return tg_declared; }
uint64_t emu_switches() { return switches; }
// Bytes of an output that no thread wrote (checked mode).
uint64_t emu_unwritten(int slot) {
  uint64_t n = 0;
  for (auto w : shadow[slot].writer) n += w == 0;
  return n;
}
void emu_counters(int slot, Counters* out) {
  *out = counters[slot];
  for (size_t i = 0; i < touched[slot].size(); i++) {
    out->unique_read += touched[slot][i] & 1;
    out->unique_written += touched[slot][i] >> 1 & 1;
  }
  for (size_t i = 0; i < touched[slot].size(); i += 128) {
    uint8_t any = 0;
    for (size_t j = i; j < std::min(i + 128, touched[slot].size()); j++) any |= touched[slot][j];
    out->minimum_lines += any != 0;
  }
}

// ---- what the sanitizer pass calls -----------------------------------------------------------
#define PC ((uint64_t)__builtin_return_address(0))
#define HOOKS(n)                                                                        \
  void __tsan_read##n(void* p) { access((uintptr_t)p, n, false, true, PC); }             \
  void __tsan_write##n(void* p) { access((uintptr_t)p, n, true, true, PC); }             \
  void __tsan_unaligned_read##n(void* p) { access((uintptr_t)p, n, false, false, PC); }  \
  void __tsan_unaligned_write##n(void* p) { access((uintptr_t)p, n, true, false, PC); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
static void range(void* p, size_t size, bool write, uint64_t pc) {
  for (size_t i = 0; i < size; i += 4) access((uintptr_t)p + i, std::min<size_t>(4, size - i), write, false, pc);
}
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  range((void*)from, size, false, PC);
  range(to, size, true, PC);
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  range((void*)from, size, false, PC);
  range(to, size, true, PC);
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  range(to, size, true, PC);
  return memset(to, value, size);
}
}
