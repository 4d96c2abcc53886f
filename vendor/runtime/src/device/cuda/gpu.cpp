// Opening a GPU, counting its memory, and owning what lives on it.
#include "device/cuda/gpu.h"

#include <algorithm>

#include "base/log.h"

namespace qi::cuda {

namespace {

constexpr int oldest_architecture = 75;

struct OpenGpus {
    std::mutex mutex;
    std::map<int, std::weak_ptr<Gpu>> by_ordinal;
};

OpenGpus& open_gpus() {
    static OpenGpus& instance = *new OpenGpus;
    return instance;
}

int attribute(const Driver& driver, int which, CUdevice device) {
    int value = 0;
    check(driver.cuDeviceGetAttribute(&value, which, device), "asking what the GPU is");
    return value;
}

// Of what newer drivers may stop to tell.
int optional_attribute(const Driver& driver, int which, CUdevice device) {
    int value = 0;
    return driver.cuDeviceGetAttribute(&value, which, device) == CUDA_SUCCESS ? value : 0;
}

CUdevice device_of(const Driver& driver, int ordinal) {
    const int n = Gpu::count();
    if (ordinal < 0 || ordinal >= n)
        fail(QI_DEVICE, "there is no GPU %d: %d %s visible, numbered from 0", ordinal, n,
             n == 1 ? "is" : "are");
    CUdevice device = 0;
    check(driver.cuDeviceGet(&device, ordinal), "opening the GPU");
    return device;
}

std::string uuid_text(const CUuuid& uuid) {
    std::string text = "GPU-";
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        text += format("%02x", uuid.bytes[i]);
    }
    return text;
}

double mebibytes(size_t n_bytes) {
    return double(n_bytes) / double(1 << 20);
}

}  // namespace

// ---- the GPU ----

int Gpu::count() {
    int n = 0;
    check(driver().cuDeviceGetCount(&n), "counting GPUs");
    return n;
}

Gpu::Attributes Gpu::describe(int ordinal) {
    const Driver& d = driver();
    const CUdevice device = device_of(d, ordinal);
    Attributes a;
    a.ordinal = ordinal;
    char name[256] = {};
    check(d.cuDeviceGetName(name, int(sizeof name) - 1, device), "asking the GPU's name");
    a.name = name;
    CUuuid uuid = {};
    check(d.cuDeviceGetUuid(&uuid, device), "asking the GPU's identity");
    a.uuid = uuid_text(uuid);
    a.architecture = 10 * attribute(d, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) +
                     attribute(d, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    a.n_sm = attribute(d, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    a.max_threads_per_sm = attribute(d, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, device);
    a.shared_bytes_per_block =
        attribute(d, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
    a.has_watchdog = attribute(d, CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT, device) != 0;
    a.l2_bytes = attribute(d, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, device);
    size_t total = 0;
    check(d.cuDeviceTotalMem(&total, device), "asking for the GPU's memory size");
    a.memory_bytes = int64_t(total);
    const double clock = optional_attribute(d, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, device);
    const double bits = optional_attribute(d, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, device);
    a.memory_bandwidth = clock * 1e3 * 2 * bits / 8;  // two transfers per clock
    return a;
}

std::shared_ptr<Gpu> Gpu::open(int ordinal) {
    driver();  // refuses a fork before the mutex is touched, which another thread may have held
    OpenGpus& gpus = open_gpus();
    std::lock_guard lock(gpus.mutex);
    std::weak_ptr<Gpu>& known = gpus.by_ordinal[ordinal];
    std::shared_ptr<Gpu> gpu = known.lock();
    if (!gpu) known = gpu = std::shared_ptr<Gpu>(new Gpu(ordinal));
    return gpu;
}

Gpu::Gpu(int ordinal) : attributes_(describe(ordinal)) {
    const Driver& d = driver();
    if (attributes_.architecture < oldest_architecture)
        fail(QI_DEVICE,
             "GPU %d (%s) has compute capability %d.%d, and qinfer's kernels need 7.5 or newer",
             ordinal, attributes_.name.c_str(), attributes_.architecture / 10,
             attributes_.architecture % 10);
    device_ = device_of(d, ordinal);
    check(d.cuDevicePrimaryCtxRetain(&context_, device_), "opening a context on the GPU");
}

Gpu::~Gpu() {
    if (const Driver* d = driver_if_usable()) d->cuDevicePrimaryCtxRelease(device_);
}

size_t Gpu::free_bytes() const {
    Current current(*this);
    size_t free = 0;
    size_t total = 0;
    check(driver().cuMemGetInfo(&free, &total), "asking for the GPU's free memory");
    return free;
}

std::shared_ptr<Module> Gpu::module(std::string_view unit) {
    driver();  // refuses a fork before a mutex is touched
    KnownModule* known = nullptr;
    {
        std::lock_guard lock(modules_mutex_);
        auto at = modules_.find(unit);
        if (at == modules_.end())
            at = modules_.emplace(unit, std::make_unique<KnownModule>()).first;
        known = at->second.get();
    }
    // One lock per unit, so that threads compile different ones side by side.
    std::lock_guard lock(known->mutex);
    std::shared_ptr<Module> module = known->module.lock();
    if (!module) known->module = module = std::make_shared<Module>(shared_from_this(), unit);
    return module;
}

std::shared_mutex& Gpu::recording() {
    driver();  // refuses a fork before a mutex is touched
    return recording_;
}

Current::Current(const Gpu& gpu) {
    check(driver().cuCtxPushCurrent(gpu.context()), "entering its context");
    pushed_ = true;
}

Current::Current(const Gpu& gpu, std::nothrow_t) noexcept {
    const Driver* d = driver_if_usable();
    // Twice, because a failure that passes would leave behind what is to be released.
    pushed_ = d != nullptr && (d->cuCtxPushCurrent(gpu.context()) == CUDA_SUCCESS ||
                               d->cuCtxPushCurrent(gpu.context()) == CUDA_SUCCESS);
}

Current::~Current() {
    if (!pushed_) return;
    CUcontext popped = nullptr;
    if (const Driver* d = driver_if_usable()) d->cuCtxPopCurrent(&popped);
}

// ---- memory ----

void Budget::lower(size_t n_bytes) {
    const size_t limit = limit_bytes();
    limit_ = std::max(used_bytes(), limit - std::min(limit, n_bytes));
}

bool Budget::take(size_t n_bytes) {
    size_t used = used_.load(std::memory_order_relaxed);
    do {
        if (n_bytes > limit_bytes() - used) return false;
    } while (!used_.compare_exchange_weak(used, used + n_bytes, std::memory_order_relaxed));
    const size_t now = used + n_bytes;
    size_t peak = peak_.load(std::memory_order_relaxed);
    while (peak < now && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
    }
    return true;
}

size_t DeviceMemory::counted_bytes(size_t n_bytes) {
    constexpr size_t page = size_t(2) << 20;
    const size_t step = n_bytes < page ? 512 : page;
    if (n_bytes > SIZE_MAX - step) return SIZE_MAX;
    return (n_bytes + step - 1) / step * step;
}

DeviceMemory::DeviceMemory(std::shared_ptr<Gpu> gpu, std::shared_ptr<Budget> budget, size_t n_bytes,
                           const char* what)
    : OnGpu(std::move(gpu)), budget_(std::move(budget)), n_bytes_(n_bytes) {
    if (n_bytes == 0) return;
    const Driver& d = driver();
    const size_t counted = counted_bytes(n_bytes);
    Current current(*this->gpu());
    size_t free = 0;
    size_t total = 0;
    const auto refuse = [&](const std::string& reason) {
        std::string left;
        if (budget_->limit_bytes() != Budget::unlimited)
            left = format("; %.1f MiB are left of the budget of %.1f MiB",
                          mebibytes(budget_->left_bytes()), mebibytes(budget_->limit_bytes()));
        if (d.cuMemGetInfo(&free, &total) == CUDA_SUCCESS)
            left += format("; %.1f MiB are free of the card's %.1f MiB", mebibytes(free),
                           mebibytes(total));
        fail(QI_MEMORY, "no GPU memory for %s: %.1f MiB asked for, %s%s", what, mebibytes(n_bytes),
             reason.c_str(), left.c_str());
    };
    if (!budget_->take(counted)) refuse("more than the VRAM budget allows");
    const CUresult result = d.cuMemAlloc(&address_, n_bytes);
    if (result == CUDA_SUCCESS) return;
    budget_->give_back(counted);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) refuse("and the card has too little");
    fail_cuda(result, format("allocating %.1f MiB for %s", mebibytes(n_bytes), what).c_str());
}

DeviceMemory::~DeviceMemory() {
    if (address_ == 0) return;
    Current current(*gpu(), std::nothrow);
    if (current.ok()) driver_if_usable()->cuMemFree(address_);
    budget_->give_back(counted_bytes(n_bytes_));
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : OnGpu(std::move(other)),
      budget_(std::move(other.budget_)),
      address_(std::exchange(other.address_, 0)),
      n_bytes_(std::exchange(other.n_bytes_, 0)) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
    OnGpu::operator=(std::move(other));
    std::swap(budget_, other.budget_);
    std::swap(address_, other.address_);
    std::swap(n_bytes_, other.n_bytes_);
    return *this;
}

PinnedMemory::PinnedMemory(std::shared_ptr<Gpu> gpu, size_t n_bytes, const char* what)
    : OnGpu(std::move(gpu)), n_bytes_(n_bytes) {
    if (n_bytes == 0) return;
    const Driver& d = driver();
    Current current(*this->gpu());
    void* data = nullptr;
    const CUresult result =
        d.cuMemHostAlloc(&data, n_bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        fail(QI_MEMORY,
             "no pinned host memory for %s: %.1f MiB asked for, and the system does not lend it",
             what, mebibytes(n_bytes));
    check(result, format("pinning %.1f MiB for %s", mebibytes(n_bytes), what).c_str());
    const CUresult mapped = d.cuMemHostGetDevicePointer(&device_address_, data, 0);
    if (mapped != CUDA_SUCCESS) {
        d.cuMemFreeHost(data);
        fail_cuda(mapped, format("mapping pinned memory for %s", what).c_str());
    }
    data_ = static_cast<std::byte*>(data);
}

PinnedMemory::~PinnedMemory() {
    if (data_ == nullptr) return;
    Current current(*gpu(), std::nothrow);
    if (current.ok()) driver_if_usable()->cuMemFreeHost(data_);
}

PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : OnGpu(std::move(other)),
      data_(std::exchange(other.data_, nullptr)),
      device_address_(std::exchange(other.device_address_, 0)),
      n_bytes_(std::exchange(other.n_bytes_, 0)) {}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
    OnGpu::operator=(std::move(other));
    std::swap(data_, other.data_);
    std::swap(device_address_, other.device_address_);
    std::swap(n_bytes_, other.n_bytes_);
    return *this;
}

// ---- streams and events ----

Stream::Stream(std::shared_ptr<Gpu> gpu, int priority) : OnGpu(std::move(gpu)) {
    Current current(*this->gpu());
    check(driver().cuStreamCreateWithPriority(&handle_, CU_STREAM_NON_BLOCKING, priority),
          "making a stream");
}

Stream::~Stream() {
    if (handle_ == nullptr) return;
    Current current(*gpu(), std::nothrow);
    if (!current.ok()) return;
    // An exception may pass by while work is queued; the memory and the kernels that it uses are
    // released next. A lost device answers at once.
    const Driver& d = *driver_if_usable();
    if (d.cuStreamSynchronize(handle_) != CUDA_SUCCESS) d.cuCtxSynchronize();
    d.cuStreamDestroy(handle_);
}

Stream::Stream(Stream&& other) noexcept
    : OnGpu(std::move(other)),
      handle_(std::exchange(other.handle_, nullptr)),
      n_launches_(other.n_launches_) {}

Stream& Stream::operator=(Stream&& other) noexcept {
    OnGpu::operator=(std::move(other));
    std::swap(handle_, other.handle_);
    std::swap(n_launches_, other.n_launches_);
    return *this;
}

void Stream::synchronize() const {
    check(driver().cuStreamSynchronize(handle_), "computing");
}

bool Stream::idle() const {
    const CUresult result = driver().cuStreamQuery(handle_);
    if (result == CUDA_ERROR_NOT_READY) return false;
    check(result, "computing");
    return true;
}

void Stream::wait(const Event& event) const {
    check(driver().cuStreamWaitEvent(handle_, event.handle(), 0), "letting a stream wait");
}

void Stream::copy_to_device(CUdeviceptr to, const void* from, size_t n_bytes) const {
    if (n_bytes > 0)
        check(driver().cuMemcpyHtoDAsync(to, from, n_bytes, handle_), "copying to the GPU");
}

void Stream::copy_to_host(void* to, CUdeviceptr from, size_t n_bytes) const {
    if (n_bytes > 0)
        check(driver().cuMemcpyDtoHAsync(to, from, n_bytes, handle_), "copying from the GPU");
}

void Stream::copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t n_bytes) const {
    if (n_bytes > 0)
        check(driver().cuMemcpyDtoDAsync(to, from, n_bytes, handle_), "copying on the GPU");
}

void Stream::fill(CUdeviceptr at, uint8_t value, size_t n_bytes) const {
    if (n_bytes > 0)
        check(driver().cuMemsetD8Async(at, value, n_bytes, handle_), "filling GPU memory");
}

Event::Event(std::shared_ptr<Gpu> gpu, bool timing) : OnGpu(std::move(gpu)) {
    Current current(*this->gpu());
    check(driver().cuEventCreate(&handle_, timing ? CU_EVENT_DEFAULT : CU_EVENT_DISABLE_TIMING),
          "making an event");
}

Event::~Event() {
    if (handle_ == nullptr) return;
    Current current(*gpu(), std::nothrow);
    if (current.ok()) driver_if_usable()->cuEventDestroy(handle_);
}

Event::Event(Event&& other) noexcept
    : OnGpu(std::move(other)), handle_(std::exchange(other.handle_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
    OnGpu::operator=(std::move(other));
    std::swap(handle_, other.handle_);
    return *this;
}

void Event::record(const Stream& stream) const {
    check(driver().cuEventRecord(handle_, stream.handle()), "recording an event");
}

bool Event::done() const {
    const CUresult result = driver().cuEventQuery(handle_);
    if (result == CUDA_ERROR_NOT_READY) return false;
    check(result, "computing");
    return true;
}

void Event::synchronize() const {
    check(driver().cuEventSynchronize(handle_), "computing");
}

double Event::seconds_between(const Event& begin, const Event& end) {
    float milliseconds = 0.0f;
    check(driver().cuEventElapsedTime(&milliseconds, begin.handle(), end.handle()),
          "measuring time");
    return double(milliseconds) / 1e3;
}

// ---- kernels ----

Module::Module(std::shared_ptr<Gpu> gpu, std::string_view unit)
    : OnGpu(std::move(gpu)), unit_(unit) {
    const Driver& d = driver();
    Current current(*this->gpu());
    Cubin cubin = make_cubin(unit, this->gpu()->attributes().architecture);
    while (true) {
        const CUresult result =
            d.cuModuleLoadDataEx(&handle_, cubin.bytes.data(), 0, nullptr, nullptr);
        if (result == CUDA_SUCCESS) {
            origin_ = cubin.origin;
            compile_seconds_ = cubin.seconds;
            return;
        }
        handle_ = nullptr;
        const bool unfit =
            result == CUDA_ERROR_INVALID_IMAGE || result == CUDA_ERROR_NO_BINARY_FOR_GPU ||
            result == CUDA_ERROR_INVALID_SOURCE || result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
        if (!unfit || cubin.origin == Cubin::Origin::compiled)
            fail_cuda(result, format("loading the kernels of '%s'", unit_.c_str()).c_str());
        const bool embedded = cubin.origin == Cubin::Origin::embedded;
        log(LogLevel::info, format("the driver refuses the %s kernels of '%s' (%s): making others",
                                   embedded ? "embedded" : "cached", unit_.c_str(),
                                   result_text(d, result).c_str()));
        cubin = make_cubin(unit, this->gpu()->attributes().architecture,
                           embedded ? Cubin::Origin::cached : Cubin::Origin::compiled);
    }
}

Module::~Module() {
    Current current(*gpu(), std::nothrow);
    if (current.ok()) driver_if_usable()->cuModuleUnload(handle_);
}

Function Module::function(const char* name) const {
    Current current(*gpu());
    CUfunction handle = nullptr;
    const CUresult result = driver().cuModuleGetFunction(&handle, handle_, name);
    check(result, format("looking for the kernel %s in '%s'", name, unit_.c_str()).c_str());
    return Function(handle, name);
}

void Function::allow_dynamic_shared(int n_bytes) const {
    const CUresult result = driver().cuFuncSetAttribute(
        handle_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, n_bytes);
    check(result, format("giving the kernel %s %d bytes of shared memory", name_, n_bytes).c_str());
}

void Function::launch_with(const Stream& stream, Size3 grid, Size3 block, unsigned shared_bytes,
                           void** parameters) const {
    const CUresult result =
        driver().cuLaunchKernel(handle_, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                shared_bytes, stream.handle(), parameters, nullptr);
    if (result != CUDA_SUCCESS) [[unlikely]]
        fail_cuda(result, format("launching the kernel %s, grid %u·%u·%u, block %u·%u·%u", name_,
                                 grid.x, grid.y, grid.z, block.x, block.y, block.z)
                              .c_str());
    ++stream.n_launches_;
}

// ---- graphs ----

void Graph::begin(const Stream& stream) {
    check(driver().cuStreamBeginCapture(stream.handle(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
          "beginning to record a graph");
}

void Graph::abandon(const Stream& stream) noexcept {
    const Driver* d = driver_if_usable();
    CUgraph graph = nullptr;
    if (d != nullptr && d->cuStreamEndCapture(stream.handle(), &graph) == CUDA_SUCCESS && graph)
        d->cuGraphDestroy(graph);
}

void Graph::finish(const Stream& stream, std::span<Graph> others) {
    const Driver& d = driver();
    // What was recorded has not been launched.
    n_launches_ = std::exchange(stream.n_launches_, n_launches_) - n_launches_;
    CUgraph graph = nullptr;
    const CUresult ended = d.cuStreamEndCapture(stream.handle(), &graph);
    if (ended != CUDA_SUCCESS) {
        if (graph != nullptr) d.cuGraphDestroy(graph);
        abandon(stream);
        fail_cuda(ended, "recording a graph");
    }
    CUresult result = d.cuGraphInstantiateWithFlags(&executable_, graph, 0);
    for (Graph& other : others) {
        if (result != CUDA_SUCCESS) break;
        other = Graph(stream.gpu());
        other.n_launches_ = n_launches_;
        result = d.cuGraphInstantiateWithFlags(&other.executable_, graph, 0);
    }
    d.cuGraphDestroy(graph);
    if (result == CUDA_SUCCESS) return;
    // A constructor that throws has no destructor.
    if (executable_ != nullptr) d.cuGraphExecDestroy(std::exchange(executable_, nullptr));
    fail_cuda(result, "making a graph ready");
}

Graph::~Graph() {
    if (executable_ == nullptr) return;
    Current current(*gpu(), std::nothrow);
    if (current.ok()) driver_if_usable()->cuGraphExecDestroy(executable_);
}

Graph::Graph(Graph&& other) noexcept
    : OnGpu(std::move(other)),
      executable_(std::exchange(other.executable_, nullptr)),
      n_launches_(other.n_launches_) {}

Graph& Graph::operator=(Graph&& other) noexcept {
    OnGpu::operator=(std::move(other));
    std::swap(executable_, other.executable_);
    std::swap(n_launches_, other.n_launches_);
    return *this;
}

void Graph::launch(const Stream& stream) const {
    check(driver().cuGraphLaunch(executable_, stream.handle()), "replaying a graph");
    stream.n_launches_ += n_launches_;
}

}  // namespace qi::cuda
