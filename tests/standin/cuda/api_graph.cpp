// Stream capture and graphs. A graph is a list of operations with the values they were captured
// with; launching it queues them as one operation, in an order that its edges allow.
#include <algorithm>
#include <cstring>
#include <random>

#include "control.h"

namespace standin {

void Driver::invalidate(Capture& capture) {
    capture.invalid = true;
}

void Driver::refuse_in_capture() {
    for (const auto& capture : captures) {
        const bool affected = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
                              (capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL &&
                               capture->thread == std::this_thread::get_id());
        if (!affected) continue;
        invalidate(*capture);
        throw Failure{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
    }
}

bool Driver::invalidate_captures() {
    for (const auto& capture : captures)
        invalidate(*capture);
    return !captures.empty();
}

void Driver::capture_node(Stream& stream, Kind kind, std::initializer_list<Part> parts,
                          Module* module) {
    Capture& capture = *stream.capture;
    require(!capture.invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    Node node;
    node.kind = kind;
    node.module = module;
    for (const Part& part : parts) {
        const auto* bytes = static_cast<const std::byte*>(part.data);
        node.payload.insert(node.payload.end(), bytes, bytes + part.bytes);
    }
    node.after = stream.tail;
    stream.tail = {static_cast<uint32_t>(capture.graph.nodes.size())};
    capture.graph.nodes.push_back(std::move(node));
}

// A stream that waits for an event joins the event's capture: what it captures comes after.
void Driver::join_capture(Stream& stream, Event& event) {
    auto refuse = [&](CUresult code) {
        if (stream.capture) invalidate(*stream.capture);
        if (event.capture) invalidate(*event.capture);
        throw Failure{code};
    };
    // From outside into a capture, nothing may be waited for.
    if (!event.capture) refuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (event.capture->invalid) refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    if (!captures.contains(event.capture)) refuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (stream.capture && stream.capture != event.capture) refuse(CUDA_ERROR_STREAM_CAPTURE_MERGE);
    if (stream.legacy) refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    if (!stream.capture) {
        stream.capture = event.capture;
        stream.capture->streams.insert(&stream);
        stream.tail.clear();
    }
    for (const uint32_t node : event.tail) {
        if (std::find(stream.tail.begin(), stream.tail.end(), node) == stream.tail.end())
            stream.tail.push_back(node);
    }
}

namespace {

// Nodes in an order that respects their edges; as captured, or drawn at random.
std::vector<uint32_t> order_of(const std::vector<Node>& nodes, uint64_t seed) {
    std::vector<uint32_t> order, open(nodes.size()), ready;
    std::vector<std::vector<uint32_t>> before(nodes.size());
    for (uint32_t i = 0; i < nodes.size(); i++) {
        open[i] = static_cast<uint32_t>(nodes[i].after.size());
        for (const uint32_t other : nodes[i].after)
            before[other].push_back(i);
        if (open[i] == 0) ready.push_back(i);
    }
    std::mt19937_64 random(seed);
    while (!ready.empty()) {
        auto next = seed ? ready.begin() + static_cast<long>(random() % ready.size())
                         : std::min_element(ready.begin(), ready.end());
        const uint32_t node = *next;
        ready.erase(next);
        order.push_back(node);
        for (const uint32_t other : before[node]) {
            if (--open[other] == 0) ready.push_back(other);
        }
    }
    return order;
}

// Copies and fills name their memory, so that they can be checked before they run.
bool memory_is_there(Driver& d, const Node& node) {
    if (node.kind == Kind::copy) {
        Copy copy;
        std::memcpy(&copy, node.payload.data(), sizeof copy);
        return d.device_readable(copy.to, copy.bytes) && d.device_readable(copy.from, copy.bytes);
    }
    if (node.kind == Kind::fill) {
        Fill fill;
        std::memcpy(&fill, node.payload.data(), sizeof fill);
        return d.device_readable(fill.to, fill.count * fill.width);
    }
    return true;
}

// Every capture node that no other follows must be behind the origin's last ones.
bool joined(const Capture& capture) {
    std::vector<bool> reached(capture.graph.nodes.size());
    std::vector<uint32_t> todo = capture.origin->tail;
    while (!todo.empty()) {
        const uint32_t node = todo.back();
        todo.pop_back();
        if (reached[node]) continue;
        reached[node] = true;
        const auto& after = capture.graph.nodes[node].after;
        todo.insert(todo.end(), after.begin(), after.end());
    }
    return std::all_of(reached.begin(), reached.end(), [](bool r) { return r; });
}

}  // namespace
}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return api("cuStreamBeginCapture_v2", everything, [&](Driver& d, auto&) {
        require(mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && mode <= CU_STREAM_CAPTURE_MODE_RELAXED,
                CUDA_ERROR_INVALID_VALUE);
        require(handle && handle != CU_STREAM_LEGACY, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        Stream& stream = d.stream(handle);
        if (stream.capture) {
            d.invalidate(*stream.capture);
            throw Failure{CUDA_ERROR_ILLEGAL_STATE};
        }
        auto capture = std::make_shared<Capture>();
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        capture->origin = &stream;
        capture->streams = {&stream};
        stream.capture = capture;
        stream.tail.clear();
        d.captures.insert(std::move(capture));
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    const CUresult result = api("cuStreamEndCapture", everything | releases, [&](Driver& d, auto&) {
        require(graph, CUDA_ERROR_INVALID_VALUE);
        *graph = nullptr;
        Stream& stream = d.stream(handle);
        require(stream.capture != nullptr, CUDA_ERROR_ILLEGAL_STATE);
        const std::shared_ptr<Capture> capture = stream.capture;
        require(capture->origin == &stream, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        require(capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED ||
                    capture->thread == std::this_thread::get_id(),
                CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        const bool is_joined = joined(*capture);
        for (Stream* s : capture->streams) {
            s->capture.reset();
            s->tail.clear();
        }
        d.captures.erase(capture);
        require(!capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        require(is_joined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        *graph = d.graphs.add(std::make_unique<Graph>(std::move(capture->graph)));
        return CUDA_SUCCESS;
    });
    if (result != CUDA_SUCCESS && graph &&
        *graph) {  // told to fail: the capture is over all the same
        std::lock_guard lock(driver().mutex);
        driver().graphs.remove(*graph);
        *graph = nullptr;
    }
    return result;
}

STANDIN_API CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return api("cuStreamIsCapturing", everything, [&](Driver& d, auto&) {
        require(status, CUDA_ERROR_INVALID_VALUE);
        const Stream& stream = d.stream(handle);
        *status = !stream.capture           ? CU_STREAM_CAPTURE_STATUS_NONE
                  : stream.capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                            : CU_STREAM_CAPTURE_STATUS_ACTIVE;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph,
                                                 unsigned long long flags) {
    return api("cuGraphInstantiateWithFlags", everything, [&](Driver& d, auto&) {
        require(executable && flags < 16, CUDA_ERROR_INVALID_VALUE);
        auto made = std::make_unique<GraphExec>();
        made->nodes = d.graphs.get(graph).nodes;
        d.require_free(made->nodes.size() * node_bytes);
        made->context = &d.current();
        *executable = d.executables.add(std::move(made));
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    return api("cuGraphLaunch", everything, [&](Driver& d, auto&) {
        GraphExec& executable = d.executables.get(handle);
        Stream& stream = d.stream(stream_handle);
        require(executable.context == stream.context, CUDA_ERROR_INVALID_VALUE);
        if (stream.capture) {  // a graph as a node of another is more than we use
            d.invalidate(*stream.capture);
            throw Failure{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
        }
        const uint64_t seed = d.settings.seed ? d.settings.seed + executable.launches : 0;
        std::vector<std::byte> batch;
        for (const uint32_t i : order_of(executable.nodes, seed)) {
            const Node& node = executable.nodes[i];
            if (!memory_is_there(d, node))
                d.complain(CUDA_ERROR_ILLEGAL_ADDRESS,
                           "cuGraphLaunch of a copy or fill whose memory was freed");
            if (node.kind == Kind::copy) {
                Copy copy;
                std::memcpy(&copy, node.payload.data(), sizeof copy);
                if (!d.find_device(copy.to, copy.bytes)) d.copied_to_host += copy.bytes;
            }
            d.launches += node.kind == Kind::launch;
            if (node.module) {
                // The real driver would run what is no longer there.
                bool alive = false;
                for (const auto& [h, module] : d.modules)
                    alive |= module.get() == node.module;
                if (!alive)
                    d.complain(CUDA_ERROR_ILLEGAL_STATE,
                               "cuGraphLaunch of a kernel whose module was unloaded");
                node.module->uses[stream.slot] = d.last[stream.slot] + 1;
            }
            const Header header = {node.kind, stream.slot, 0, node.payload.size()};
            const auto* bytes = reinterpret_cast<const std::byte*>(&header);
            batch.insert(batch.end(), bytes, bytes + sizeof header);
            batch.insert(batch.end(), node.payload.begin(), node.payload.end());
            for (size_t at = 0; at + 8 <= node.payload.size(); at += 8) {
                uint64_t address;  // if it is one
                std::memcpy(&address, node.payload.data() + at, 8);
                d.note_use(stream, address);
            }
        }
        executable.launches++;
        d.graph_launches++;
        d.submit(stream, Kind::batch, {{batch.data(), batch.size()}});
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuGraphExecDestroy(CUgraphExec handle) {
    return api("cuGraphExecDestroy", everything | releases, [&](Driver& d, auto&) {
        d.executables.get(handle);
        d.executables.remove(handle);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuGraphDestroy(CUgraph handle) {
    return api("cuGraphDestroy", everything | releases, [&](Driver& d, auto&) {
        d.graphs.get(handle);
        d.graphs.remove(handle);
        return CUDA_SUCCESS;
    });
}
