#include "device/cuda/cuda_accelerator.h"

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"
#include "device/cuda/neuron_mover.h"
#include "device/cuda/rehearsal.h"
#include "device/cuda/speeds.h"

namespace qi::cuda {

namespace {

class CudaAccelerator final : public Accelerator {
  public:
    CudaAccelerator(int ordinal, std::optional<size_t> budget) {
        share_.gpu = Gpu::open(ordinal);
        share_.kernels = std::make_shared<Kernels>(share_.gpu);
        if (budget) take_budget(*budget);
    }

    std::string name() const override {
        const Gpu::Attributes& gpu = share_.gpu->attributes();
        return format("%s (cuda:%d)", gpu.name.c_str(), gpu.ordinal);
    }
    size_t budget() const override {
        return share_.budget ? share_.budget->limit_bytes() : share_.gpu->free_bytes();
    }
    size_t used() const override { return share_.budget ? share_.budget->used_bytes() : 0; }

    void prepare(std::span<const Type> weight_types, const DeviceNeeds& needs) override {
        const Current current(*share_.gpu);
        if (!is_prepared_) forget_budget_near_free();
        is_prepared_ = true;
        share_.kernels->load_common_kernels();
        find_cublas();
        // Code takes memory, too; under a budget it is not counted, and loaded when first used.
        if (is_measured_) return load_more(needs.kv.type);
        if (share_.budget) return;
        for (const Type type : weight_types)
            share_.kernels->load_weight_kernels(type);
        share_.kernels->load_kv_kernels(needs.kv.type);
        share_.kernels->load_exchange_kernels();
        if (share_.has_cublas) load_cublas(weight_types, needs);
        const RecordedSteps steps(share_, needs);
        const size_t free = share_.gpu->free_bytes();
        constexpr auto gib = double(1 << 30);
        if (asked_ && *asked_ > free)
            log(LogLevel::info,
                format("%s: %.2f GiB of its memory may be used, %.2f GiB are free: all that is "
                       "free is the budget",
                       name().c_str(), double(*asked_) / gib, double(free) / gib));
        take_budget(asked_ ? std::min(*asked_, free) : free);
        is_measured_ = true;
    }

    size_t bytes_of(const Linear& linear) const override { return Weights::bytes_of(linear); }
    size_t bytes_of(const Norm& norm) const override { return Weights::bytes_of(norm); }
    size_t bytes_of(const FeedForward& ffn, int64_t n_neurons) const override {
        return Weights::bytes_of(ffn, n_neurons);
    }
    size_t bytes_of(const DeviceNeeds& needs) const override {
        return working_bytes(share_, needs);
    }

    void reserve(size_t n_bytes) override { share_.weights->reserve(n_bytes); }
    // The last page of the driver's that the copies do not fill.
    size_t reserve_overhead() const override { return DeviceMemory::counted_bytes(1 << 21) - 1; }

    void keep(const Linear& linear) override { share_.weights->keep(linear); }
    void keep(const Norm& norm) override { share_.weights->keep(norm); }
    void keep(const FeedForward& ffn, NeuronShard resident, NeuronShard rest) override {
        share_.weights->keep(ffn, std::move(resident), std::move(rest));
    }

    size_t bytes_to_move(const FeedForward& ffn, size_t n_neurons) const override {
        return NeuronMover::room_bytes(ffn, n_neurons);
    }
    Speeds measure_speeds(const FeedForward& ffn, Device& host) override {
        return cuda::measure_speeds(share_, ffn, host);
    }
    void move_neurons(const Moving& moving) override {
        share_.mover =
            std::make_shared<NeuronMover>(share_.gpu, share_.kernels, share_.weights, moving);
    }
    uint64_t n_moved() const override { return share_.mover ? share_.mover->n_moved() : 0; }
    std::vector<int32_t> neurons(const FeedForward& ffn) const override {
        const DeviceFfn& kept = share_.weights->find(ffn);
        if (share_.mover) return share_.mover->neurons(kept);
        const auto ids = kept.resident.neurons();
        return {ids.begin(), ids.end()};
    }

    void drop() override {
        share_.mover = nullptr;
        share_.weights = std::make_shared<Weights>(share_.gpu, share_.budget);
    }

    std::unique_ptr<Device> make_device(const DeviceNeeds& needs, Device& host) override {
        const Current current(*share_.gpu);
        // Beside other contexts nobody has asked to prepare for its type.
        share_.kernels->load_kv_kernels(needs.kv.type);
        return std::make_unique<CudaDevice>(share_, needs, host);
    }

  private:
    // For a context that is not the first.
    void load_more(Type kv_type) {
        const size_t before = share_.gpu->free_bytes();
        share_.kernels->load_kv_kernels(kv_type);
        const size_t after = share_.gpu->free_bytes();
        share_.budget->lower(before - std::min(before, after));
    }
    void find_cublas() {
        if (share_.choice) return;
        share_.choice = std::make_shared<ProductChoice>(*share_.gpu);
        try {
            cublas_info();
            // Its code takes memory, too.
            if (!share_.budget)
                Cublas(Stream(share_.gpu), std::make_shared<Budget>(Budget::unlimited));
            share_.has_cublas = true;
        } catch (const Error& error) {
            do_without_cublas(error);
        }
    }
    void load_cublas(std::span<const Type> weight_types, const DeviceNeeds& needs) {
        try {
            load_products(share_, weight_types, needs);
        } catch (const Error& error) {
            // A card that is lost fails in what is called next.
            do_without_cublas(error);
        }
    }
    void do_without_cublas(const Error& why) {
        share_.has_cublas = false;
        log(LogLevel::info,
            format("prompts are multiplied without cuBLAS, which may be slower: %s", why.what()));
    }
    // A budget is what may be used; where less is free, all of that may be. Where it is close, it
    // is measured what is left beside code.
    void forget_budget_near_free() {
        if (!share_.budget) return;
        const size_t limit = share_.budget->limit_bytes(), free = share_.gpu->free_bytes();
        const auto all = size_t(share_.gpu->attributes().memory_bytes);
        const size_t code_at_most = std::min(size_t(512) << 20, all / 16);
        if (limit < free && free - limit >= code_at_most) return;
        asked_ = limit;
        share_.budget = nullptr;
    }
    void take_budget(size_t n_bytes) {
        share_.budget = std::make_shared<Budget>(n_bytes);
        share_.weights = std::make_shared<Weights>(share_.gpu, share_.budget);
    }

    GpuShare share_;
    bool is_prepared_ = false;
    bool is_measured_ = false;     // the budget, not given, or so large that code may want a part
    std::optional<size_t> asked_;  // where that is so
};

}  // namespace

std::unique_ptr<Accelerator> make_cuda_accelerator(int ordinal, std::optional<size_t> budget) {
    return std::make_unique<CudaAccelerator>(ordinal, budget);
}

}  // namespace qi::cuda
