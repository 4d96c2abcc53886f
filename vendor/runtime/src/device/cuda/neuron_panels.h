// Neurons that the host keeps, brought to the GPU panel by panel for one step and forgotten.
//
// Bytes: what the neurons hold, once over the link; threads of the host write one panel while the
// other is on its way or used. From some tens of tokens on that takes less time than the host would
// need to compute them.
#pragma once

#include <span>

#include "device/cuda/gpu.h"
#include "device/cuda/weights.h"
#include "device/device.h"

namespace qi::cuda {

class NeuronPanels {
  public:
    // room: device memory for two panels.
    NeuronPanels(std::shared_ptr<Gpu> gpu, CUdeviceptr room, size_t panel_bytes);

    // How many neurons of a network a panel takes; 0: not even those that cannot be parted.
    int64_t neurons_together(const FeedForward& ffn) const;
    // Those neurons, ascending, and whole blocks of an ordinary down, as if the GPU kept them;
    // down's bias comes along where asked for. `stream` waits for them; they stay until done().
    DeviceFfn bring(const FeedForward& ffn, std::span<const int32_t> neurons, bool down_bias,
                    const Stream& stream);
    // What `stream` does with the panel brought last has been enqueued.
    void done(const Stream& stream);

  private:
    size_t panel_bytes_;
    CUdeviceptr panels_[2];
    PinnedMemory staging_[2];
    Event brought_[2], used_[2];
    Stream copies_;
    int side_ = 0;
};

}  // namespace qi::cuda
