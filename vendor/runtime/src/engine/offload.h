// A model's share on an accelerator: what is kept there is decided when its first context is made,
// because only then is known what keys, values and working space will take. A context made beside
// others finds what room there is; one of other sizes that is made when none is alive has it
// decided anew, so that it gets what it would have got as the first.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/accelerator.h"
#include "engine/placement.h"
#include "engine/stage.h"
#include "model/model.h"

namespace qi {

// Safe for several threads.
class Offload {
  public:
    Offload(std::shared_ptr<const Model> model, std::unique_ptr<Accelerator> accelerator);

    const std::shared_ptr<const Model>& model() const { return model_; }

    // How neurons will be chosen; QI_ARGUMENT once that has happened, and for lists or counts that
    // do not fit the model.
    void choose_neurons(int64_t layer, std::vector<int32_t> neurons);
    void count_neurons(int64_t layer, std::vector<float> counts);
    // Of neurons that counts choose, each layer keeps only so many that both sides need the same
    // time for it; QI_ARGUMENT without counts, or where down is not stored by neuron.
    void balance_layers();
    // How they will move; QI_ARGUMENT where they cannot.
    void set_neuron_cache(NeuronCache cache);

    // The accelerator's device for a context and the layers it computes. `host` computes the rest.
    struct Part {
        std::shared_ptr<const void> alive;  // for as long as the device is
        std::unique_ptr<Device> device;
        int64_t n_layers;
        bool head;
        KvShare kv_share;
    };
    // QI_MEMORY when the device cannot hold another context of these needs.
    Part make_part(const DeviceNeeds& needs, const KvWish& kv, Device& host);

    // As if no context had been made yet: the next one decides what is kept, and neurons that move
    // begin where it puts them. Does nothing while a context is alive.
    void reset();

    struct Report {
        std::string device;
        size_t budget, used;
        std::optional<Placement> placement;  // none before the first context, and after reset()
        std::string text;                    // of the placement, one line
        uint64_t n_moved;                    // neurons that took another's place since
    };
    Report report() const;
    // Those of a layer that are on the accelerator now; none before the first context.
    std::vector<int32_t> neurons(int64_t layer) const;

  private:
    void check_layer(int64_t layer) const;
    void check_open() const;
    bool is_by_neuron() const;
    void check_by_neuron(const char* what) const;
    NeuronCache cache() const;          // how neurons will move
    void measure_speeds(Device& host);  // once
    void move_neurons(NeuronCache cache, size_t room_bytes);
    void place_anew(const DeviceNeeds& needs, const KvWish& kv, Device& host);
    void make_copies(const Placement& placement, NeuronCache cache);

    std::shared_ptr<const Model> model_;
    std::unique_ptr<Accelerator> accelerator_;
    SplitChoice split_;
    bool is_balanced_ = false;
    std::optional<Speeds> speeds_;
    std::optional<Placement> placement_;
    // What it was decided for.
    std::optional<DeviceNeeds> needs_;
    KvWish kv_;
    bool has_warned_ = false;                                       // that no neuron can move
    std::optional<Placement> kept_;                                 // by which there are copies
    std::shared_ptr<const void> alive_ = std::make_shared<char>();  // held by each context, too
    mutable std::mutex mutex_;
};

}  // namespace qi
