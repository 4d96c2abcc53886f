#include "executor.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "cuda_types.h"
#include "fiber.h"
#include "race_check.h"

extern "C" {
__thread QiLane* qi_standin_lane = nullptr;
}
extern "C" void* __tls_get_addr(size_t* module_and_offset);

namespace standin {
namespace {

constexpr size_t stack_bytes = 64 << 10;
constexpr size_t stack_guard = 1 << 20;
constexpr size_t max_lanes = 1024;
constexpr size_t max_dynamic_shared = 256 << 10;
constexpr uint64_t canary = 0x5a5aa5a5c3c33c3c;

enum class State : uint8_t { unstarted, ready, at_barrier, at_collective, exited };

struct Request {
    int op;
    unsigned mask;
    unsigned long long value;
    int source, width;
    unsigned long long result;
    QiWarpFunction function;  // of qi_call; `value` points to the operands
    unsigned place;
};

struct Lane : QiLane {
    unsigned index;
    State state;
    void* sp;
    int stack;
    unsigned barrier_place;
    Request request;
};

struct Warp {
    unsigned exited;   // and lanes beyond the block's end
    unsigned waiting;  // in a collective
};

class Execution;

// One OS thread's stacks and the block it runs.
class Worker {
  public:
    Worker();
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void run_blocks(Execution& launch);

    void barrier(unsigned place);
    unsigned long long collective(int op, unsigned mask, unsigned long long value, int source,
                                  int width);
    void warp_call(unsigned mask, QiWarpFunction function, void* operands, unsigned place);
    void shared_access(unsigned offset, unsigned bytes, RaceCheck::Kind kind, unsigned line);
    void yield();
    char* dynamic_shared() const { return dynamic_; }
    const Execution* launch() const { return launch_; }
    uint64_t stacks() const { return reinterpret_cast<uint64_t>(stacks_); }

  private:
    static void fiber_entry();
    void fiber_main();
    void run_block(uint64_t block);
    void prepare_shared();
    Lane& start_lane();
    void leave();        // the current lane cannot go on: run another
    void start_fiber();  // goes on with threads not yet started, on a stack of their own
    void resume(Lane& lane);
    Lane* next_ready();
    void exited(Lane& lane);
    void release_barrier();
    void meet(const Request& request);  // the current lane in a collective
    void complete(unsigned warp, unsigned mask);
    void check_stack(int stack) const;
    std::string stuck() const;

    Execution* launch_ = nullptr;
    std::byte* stacks_;
    char* dynamic_area_;
    char* dynamic_ = nullptr;
    std::vector<Lane> lanes_;
    std::vector<Warp> warps_;
    std::vector<unsigned> order_;  // in which lanes start
    std::deque<unsigned> ready_;
    std::vector<int> free_stacks_;
    unsigned n_lanes_ = 0, started_ = 0, alive_ = 0, at_barrier_ = 0;
    Lane* current_ = nullptr;
    int current_stack_ = -1;
    void* main_sp_ = nullptr;
    RaceCheck races_;
    bool spinning_ = false;
    unsigned idle_yields_ = 0;
    std::minstd_rand random_;
};

thread_local Worker* worker = nullptr;
std::atomic<uint64_t> clock_rate{1};

Worker& this_worker() {
    thread_local std::unique_ptr<Worker> mine;
    if (!mine) {
        mine = std::make_unique<Worker>();
        install_signal_stack();
    }
    worker = mine.get();
    return *mine;
}

class Execution {
  public:
    Execution(const Grid& grid, const Configuration& configuration, uint64_t seed)
        : grid_(grid), seed_(seed) {
        total_ = static_cast<uint64_t>(grid.grid.x) * grid.grid.y * grid.grid.z;
        const uint64_t threads = static_cast<uint64_t>(grid.block.x) * grid.block.y * grid.block.z;
        const uint64_t per_sm =
            configuration.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
        resident_ = configuration.multiprocessors * (per_sm ? per_sm : 1);
        if (seed) {
            std::mt19937_64 random(seed);
            offset_ = random() % total_;
            do {
                step_ = random() % total_ + 1;
            } while (std::gcd(step_, total_) != 1);
        }
    }

    const Grid& grid() const { return grid_; }
    uint64_t seed() const { return seed_; }

    // False when every block is taken.
    bool next_block(uint64_t& block) {
        const uint64_t i = next_.fetch_add(1);
        if (i >= total_) return false;
        block =
            static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step_ + offset_) % total_);
        return true;
    }

    void spinning(int change) { spinning_ += change; }
    // Called by spinning blocks: when nothing but spinning goes on, another block may start.
    void help();

    void run() {
        this_worker().run_blocks(*this);
        std::unique_lock lock(mutex_);
        ended_.wait(lock, [&] { return helpers_ == 0; });
    }

    void helper_done() {
        std::lock_guard lock(mutex_);
        helpers_--;
        ended_.notify_all();
    }

  private:
    Grid grid_;
    uint64_t seed_;
    uint64_t total_, resident_;
    uint64_t step_ = 1, offset_ = 0;
    std::atomic<uint64_t> next_{0};
    std::atomic<int> spinning_{0};
    std::mutex mutex_;
    std::condition_variable ended_;
    int helpers_ = 0;
};

// OS threads that wait for blocks to run; they stay, since their stacks cost time to make.
class Helpers {
  public:
    void run(Execution& launch) {
        std::lock_guard lock(mutex_);
        waiting_.push_back(&launch);
        if (static_cast<size_t>(idle_) < waiting_.size()) {
            std::thread([this] { loop(); }).detach();
        } else {
            work_.notify_one();
        }
    }

  private:
    void loop() {
        for (;;) {
            Execution* launch;
            {
                std::unique_lock lock(mutex_);
                idle_++;
                work_.wait(lock, [&] { return !waiting_.empty(); });
                idle_--;
                launch = waiting_.front();
                waiting_.pop_front();
            }
            this_worker().run_blocks(*launch);
            launch->helper_done();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<Execution*> waiting_;
    int idle_ = 0;
};

Helpers& helpers() {
    static Helpers* all = new Helpers;  // never destroyed: its threads outlive main
    return *all;
}

void Execution::help() {
    if (next_.load() >= total_) return;
    std::lock_guard lock(mutex_);
    if (spinning_.load() < helpers_ + 1 || static_cast<uint64_t>(helpers_) + 1 >= resident_) return;
    helpers_++;
    helpers().run(*this);
}

Worker::Worker() {
    void* area = mmap(nullptr, stack_guard + max_lanes * stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void* dynamic = mmap(nullptr, max_dynamic_shared + page, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    prctl(PR_SET_TIMERSLACK, 1000);  // naps of microseconds are to be that
    if (area == MAP_FAILED || dynamic == MAP_FAILED)
        fail(CUDA_ERROR_OPERATING_SYSTEM, "no memory for the stacks of a block");
    mprotect(area, stack_guard, PROT_NONE);
    stacks_ = static_cast<std::byte*>(area) + stack_guard;
    dynamic_area_ = static_cast<char*>(dynamic);
    mprotect(dynamic_area_ + max_dynamic_shared, page, PROT_NONE);
    for (int i = max_lanes - 1; i >= 0; i--)
        free_stacks_.push_back(i);
    for (size_t i = 0; i < max_lanes; i++)
        lanes_.emplace_back();
}

Worker::~Worker() {
    munmap(stacks_ - stack_guard, stack_guard + max_lanes * stack_bytes);
    munmap(dynamic_area_, max_dynamic_shared + page);
}

void Worker::run_blocks(Execution& launch) {
    launch_ = &launch;
    random_.seed(static_cast<unsigned>(launch.seed() ^ 0x9e3779b9u));
    const QiIndex3 block = launch.grid().block;
    n_lanes_ = block.x * block.y * block.z;
    order_.resize(n_lanes_);
    std::iota(order_.begin(), order_.end(), 0u);
    uint64_t index;
    while (launch.next_block(index))
        run_block(index);
    launch_ = nullptr;
}

// What no thread of this block has written yet reads as NaN, not as the last block's.
void Worker::prepare_shared() {
    const Grid& grid = launch_->grid();
    if (grid.module->tls_bytes != 0) {
        size_t module_and_offset[2] = {grid.module->tls_module, 0};
        std::memset(__tls_get_addr(module_and_offset), 0xff, grid.module->tls_bytes);
    }
    const size_t bytes = (grid.dynamic_shared + 15) / 16 * 16;
    dynamic_ = dynamic_area_ + max_dynamic_shared - bytes;
    std::memset(dynamic_, 0xff, bytes);
}

void Worker::run_block(uint64_t block) {
    const Grid& grid = launch_->grid();
    const QiIndex3 dim = grid.block;
    const QiIndex3 at = {static_cast<unsigned>(block % grid.grid.x),
                         static_cast<unsigned>(block / grid.grid.x % grid.grid.y),
                         static_cast<unsigned>(block / grid.grid.x / grid.grid.y)};
    prepare_shared();
    races_.next_block();
    for (unsigned i = 0; i < n_lanes_; i++) {
        Lane& lane = lanes_[i];
        lane.thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        lane.block = at;
        lane.block_dim = dim;
        lane.grid_dim = grid.grid;
        lane.index = i;
        lane.state = State::unstarted;
    }
    warps_.assign((n_lanes_ + 31) / 32, Warp{0, 0});
    if (n_lanes_ % 32 != 0) warps_.back().exited = ~0u << n_lanes_ % 32;
    if (launch_->seed()) std::shuffle(order_.begin(), order_.end(), random_);
    started_ = at_barrier_ = 0;
    alive_ = n_lanes_;
    ready_.clear();
    spinning_ = false;
    idle_yields_ = 0;

    current_stack_ = free_stacks_.back();
    free_stacks_.pop_back();
    std::byte* bottom = stacks_ + current_stack_ * stack_bytes;
    std::memcpy(bottom, &canary, sizeof canary);
    standin_switch(&main_sp_, fresh_fiber(bottom + stack_bytes, fiber_entry));
    qi_standin_lane = nullptr;
    if (spinning_) launch_->spinning(-1);
}

void Worker::fiber_entry() {
    worker->fiber_main();
}

Lane& Worker::start_lane() {
    Lane& lane = lanes_[order_[started_++]];
    lane.state = State::ready;
    lane.stack = current_stack_;
    current_ = &lane;
    qi_standin_lane = &lane;
    return lane;
}

void Worker::fiber_main() {
    const Grid& grid = launch_->grid();
    for (;;) {
        // A thread that ends leaves its stack to the next one.
        while (started_ < n_lanes_) {
            Lane& lane = start_lane();
            grid.kernel->run(grid.arguments);
            exited(lane);
        }
        const int mine = current_stack_;
        check_stack(mine);
        free_stacks_.push_back(mine);
        void* nowhere;
        if (alive_ == 0) standin_switch(&nowhere, main_sp_);
        Lane* next = next_ready();
        if (!next) fail(CUDA_ERROR_LAUNCH_FAILED, stuck());
        current_stack_ = next->stack;
        current_ = next;
        qi_standin_lane = next;
        standin_switch(&nowhere, next->sp);
    }
}

Lane* Worker::next_ready() {
    if (ready_.empty()) return nullptr;
    if (launch_->seed() && ready_.size() > 1)
        std::swap(ready_.front(), ready_[random_() % ready_.size()]);
    Lane* lane = &lanes_[ready_.front()];
    ready_.pop_front();
    return lane;
}

void Worker::resume(Lane& lane) {
    Lane& self = *current_;
    if (&self == &lane) return;
    current_ = &lane;
    current_stack_ = lane.stack;
    qi_standin_lane = &lane;
    standin_switch(&self.sp, lane.sp);
}

void Worker::leave() {
    check_stack(current_stack_);
    if (Lane* next = next_ready()) {
        resume(*next);
        return;
    }
    if (started_ == n_lanes_) fail(CUDA_ERROR_LAUNCH_FAILED, stuck());
    start_fiber();
}

void Worker::start_fiber() {
    Lane& self = *current_;
    current_stack_ = free_stacks_.back();
    free_stacks_.pop_back();
    std::byte* bottom = stacks_ + current_stack_ * stack_bytes;
    std::memcpy(bottom, &canary, sizeof canary);
    standin_switch(&self.sp, fresh_fiber(bottom + stack_bytes, fiber_entry));
}

void Worker::check_stack(int stack) const {
    if (std::memcmp(stacks_ + stack * stack_bytes, &canary, sizeof canary) != 0)
        fail(CUDA_ERROR_LAUNCH_FAILED, "a thread needs more than the stand-in's 64 KiB of stack");
}

void Worker::exited(Lane& lane) {
    lane.state = State::exited;
    alive_--;
    Warp& warp = warps_[lane.index / 32];
    warp.exited |= 1u << lane.index % 32;
    for (unsigned i = 0; warp.waiting >> i; i++) {
        if ((warp.waiting >> i & 1u) &&
            (lanes_[lane.index / 32 * 32 + i].request.mask & warp.exited))
            fail(CUDA_ERROR_LAUNCH_FAILED,
                 "a thread ended that others of its warp wait for in a warp collective");
    }
    if (alive_ != 0 && at_barrier_ == alive_) release_barrier();
}

void Worker::release_barrier() {
    at_barrier_ = 0;
    races_.block_barrier();
    const Lane* last = nullptr;  // before this one
    for (unsigned i = 0; i < n_lanes_; i++) {
        if (lanes_[i].state != State::at_barrier) continue;
        if (last && last->index / 32 == i / 32 && last->barrier_place != lanes_[i].barrier_place)
            fail(CUDA_ERROR_LAUNCH_FAILED, "threads of a warp met in different barriers");
        last = &lanes_[i];
        lanes_[i].state = State::ready;
        if (&lanes_[i] != current_) ready_.push_back(i);
    }
}

void Worker::barrier(unsigned place) {
    current_->state = State::at_barrier;
    current_->barrier_place = place;
    if (++at_barrier_ == alive_) {
        release_barrier();
    } else {
        leave();
    }
}

void Worker::complete(unsigned warp, unsigned mask) {
    Lane* lanes = &lanes_[warp * 32];
    const Request& last = current_->request;
    unsigned votes = 0;
    void* operands[32] = {};
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1u)) continue;
        const Request& r = lanes[i].request;
        if (r.mask != mask || r.op != last.op || r.function != last.function ||
            r.place != last.place)
            fail(CUDA_ERROR_LAUNCH_FAILED,
                 "threads of a warp met in different collectives or masks");
        votes |= static_cast<unsigned>(r.value & 1u) << i;
        operands[i] = reinterpret_cast<void*>(r.value);
    }
    if (last.op == qi_call) last.function(operands);
    if (last.op == qi_syncwarp && (mask | warps_[warp].exited) == ~0u) races_.warp_barrier(warp);
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1u)) continue;
        Request& r = lanes[i].request;
        if (r.op == qi_ballot) r.result = votes;
        if (r.op <= qi_shfl_xor) {
            const int first = static_cast<int>(i) & ~(r.width - 1);
            int from = 0;
            switch (r.op) {
                case qi_shfl_idx:
                    from = first + (r.source & (r.width - 1));
                    break;
                case qi_shfl_up:
                    from = static_cast<int>(i) - r.source;
                    break;
                case qi_shfl_down:
                    from = static_cast<int>(i) + r.source;
                    break;
                default:
                    from = static_cast<int>(i) ^ r.source;
                    break;
            }
            const bool outside = r.op == qi_shfl_up ? from < first : from >= first + r.width;
            if (outside) from = static_cast<int>(i);
            if (from < 0 || from > 31 || !(mask >> from & 1u))
                fail(CUDA_ERROR_LAUNCH_FAILED, "a shuffle reads from a lane outside its mask");
            r.result = lanes[from].request.value;
        }
        lanes[i].state = State::ready;
        if (&lanes[i] != current_) ready_.push_back(warp * 32 + i);
    }
    warps_[warp].waiting &= ~mask;
}

void Worker::meet(const Request& request) {
    Lane& self = *current_;
    Warp& warp = warps_[self.index / 32];
    const unsigned bit = 1u << self.index % 32, mask = request.mask;
    if (!(mask & bit))
        fail(CUDA_ERROR_LAUNCH_FAILED, "a thread calls a warp collective whose mask leaves it out");
    if (mask & warp.exited)
        fail(CUDA_ERROR_LAUNCH_FAILED,
             "a warp collective names a lane that has ended or that the block does not have");
    self.request = request;
    warp.waiting |= bit;
    if ((warp.waiting & mask) == mask) {
        complete(self.index / 32, mask);
    } else {
        self.state = State::at_collective;
        leave();
    }
}

unsigned long long Worker::collective(int op, unsigned mask, unsigned long long value, int source,
                                      int width) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail(CUDA_ERROR_LAUNCH_FAILED, "the width of a shuffle is no power of two up to 32");
    Lane& self = *current_;
    meet({op, mask, value, source, width, 0, nullptr, 0});
    return self.request.result;
}

void Worker::warp_call(unsigned mask, QiWarpFunction function, void* operands, unsigned place) {
    meet(
        {qi_call, mask, reinterpret_cast<unsigned long long>(operands), 0, 32, 0, function, place});
}

void Worker::shared_access(unsigned offset, unsigned bytes, RaceCheck::Kind kind, unsigned line) {
    const RaceCheck::Access* other = races_.access(current_->index, offset, bytes, kind, line);
    if (!other) return;
    fail(CUDA_ERROR_LAUNCH_FAILED, "threads race for shared memory at PTX:" + std::to_string(line) +
                                       " and PTX:" + std::to_string(other->line));
}

void Worker::yield() {
    if (!ready_.empty()) {
        ready_.push_back(current_->index);
        leave();
        return;
    }
    if (started_ < n_lanes_) {
        ready_.push_back(current_->index);
        start_fiber();
        return;
    }
    if (!spinning_) {
        spinning_ = true;
        launch_->spinning(1);
    }
    launch_->help();
    // An answer is often near; if not, the processor is left to the others.
    if (++idle_yields_ < 64) {
        std::this_thread::yield();
        return;
    }
    const timespec nap = {0, 20000};
    nanosleep(&nap, nullptr);
}

std::string Worker::stuck() const {
    unsigned barrier = 0, collective = 0;
    for (unsigned i = 0; i < n_lanes_; i++) {
        barrier += lanes_[i].state == State::at_barrier;
        collective += lanes_[i].state == State::at_collective;
    }
    return "deadlock in a block: " + std::to_string(barrier) + " threads wait at __syncthreads, " +
           std::to_string(collective) + " in a warp collective, " +
           std::to_string(n_lanes_ - alive_) + " have ended";
}

std::string index_text(const QiIndex3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

}  // namespace

void run_grid(const Grid& grid, const Configuration& configuration, uint64_t seed) {
    Execution(grid, configuration, seed).run();
}

std::string whereabouts() {
    if (!qi_standin_lane || !worker || !worker->launch()) return "";
    return std::string("kernel ") + worker->launch()->grid().kernel->name + ", block " +
           index_text(qi_standin_lane->block) + ", thread " + index_text(qi_standin_lane->thread);
}

bool below_stacks(uint64_t address) {
    return worker && address < worker->stacks() && address >= worker->stacks() - stack_guard;
}

void install_signal_stack() {
    thread_local std::unique_ptr<char[]> memory;
    memory = std::make_unique<char[]>(64 << 10);
    stack_t stack{};
    stack.ss_sp = memory.get();
    stack.ss_size = 64 << 10;
    sigaltstack(&stack, nullptr);
}

void set_clock_rate(uint64_t rate) {
    clock_rate = rate;
}

}  // namespace standin

// ---- called by kernels ----

extern "C" {

void qi_standin_barrier() {
    standin::worker->barrier(0);
}

void qi_standin_barrier_at(unsigned place) {
    standin::worker->barrier(place);
}

unsigned long long qi_standin_collective(int op, unsigned mask, unsigned long long value,
                                         int source, int width) {
    return standin::worker->collective(op, mask, value, source, width);
}

void qi_standin_warp_call(unsigned mask, QiWarpFunction function, void* operands, unsigned place) {
    standin::worker->warp_call(mask, function, operands, place);
}

void qi_standin_shared_access(unsigned offset, unsigned bytes, int kind, unsigned line) {
    standin::worker->shared_access(offset, bytes, static_cast<standin::RaceCheck::Kind>(kind),
                                   line);
}

void qi_standin_yield() {
    standin::worker->yield();
}

char* qi_standin_dynamic_shared() {
    if (!standin::worker || !standin::worker->launch())
        standin::fail(CUDA_ERROR_LAUNCH_FAILED, "extern __shared__ is used outside of a function");
    return standin::worker->dynamic_shared();
}

unsigned long long qi_standin_time() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (static_cast<unsigned long long>(now.tv_sec) * 1000000000ull +
            static_cast<unsigned long long>(now.tv_nsec)) *
           standin::clock_rate.load(std::memory_order_relaxed);
}

void qi_standin_sleep(unsigned) {
    qi_standin_yield();
}

void qi_standin_trap() {
    standin::fail(CUDA_ERROR_LAUNCH_FAILED, "the kernel trapped");
}

void qi_standin_misaligned(unsigned long long address, const char* file, unsigned line) {
    char text[32];
    snprintf(text, sizeof text, "%#llx", address);
    standin::fail(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address " + std::string(text) +
                                                     " at " + file + ":" + std::to_string(line));
}

void qi_standin_fault(const char* what, const char* file, unsigned line) {
    standin::fail(CUDA_ERROR_ILLEGAL_ADDRESS,
                  std::string(what) + " at " + file + ":" + std::to_string(line));
}

// The compiler's checks of alignment and of array bounds call these; no sanitizer library is there.
struct QiSource {
    const char* file;
    unsigned line, column;
};
void __ubsan_handle_type_mismatch_v1_abort(const QiSource* source, void* pointer) {
    qi_standin_misaligned(reinterpret_cast<unsigned long long>(pointer), source->file,
                          source->line);
}
void __ubsan_handle_out_of_bounds_abort(const QiSource* source, void* index) {
    const std::string what =
        "index " + std::to_string(reinterpret_cast<intptr_t>(index)) + " is outside of an array";
    qi_standin_fault(what.c_str(), source->file, source->line);
}
}
