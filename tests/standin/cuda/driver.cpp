#include "driver.h"

#include <sys/mman.h>
#include <algorithm>
#include <cstdio>

#include "control.h"

namespace standin {

Driver& driver() {
    static Driver* the = new Driver;  // outlives other libraries' destructors
    return *the;
}

std::vector<Context*>& context_stack() {
    thread_local std::vector<Context*> stack;
    return stack;
}

Context& Driver::current() {
    std::vector<Context*>& stack = context_stack();
    require(!stack.empty() && stack.back(), CUDA_ERROR_INVALID_CONTEXT);
    require(stack.back()->references > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return *stack.back();
}

int Driver::device_of(CUdevice device) const {
    require(device >= 0 && device < static_cast<int>(visible.size()), CUDA_ERROR_INVALID_DEVICE);
    return device;
}

void Driver::destroy_context(Context& context) {
    auto lives_here = [&](const auto& object) { return object.context == &context; };
    for (const auto& [handle, stream] : streams) {
        if (lives_here(*stream)) free_slots.push_back(stream->slot);
    }
    for (const auto& [handle, event] : events) {
        if (lives_here(*event)) free_events.push_back(event->slot);
    }
    const bool alive = gpu.error() == CUDA_SUCCESS;
    for (const auto& [handle, module] : modules) {
        if (!lives_here(*module)) continue;
        for (const auto& function : module->functions)
            functions.erase(function->handle);
        if (alive) gpu.send(Kind::unload_module, 0, 0, {{&module->id, sizeof module->id}});
    }
    captures.clear();
    products.clear();
    streams.remove_if(lives_here);
    events.remove_if(lives_here);
    modules.remove_if(lives_here);
    executables.remove_if(lives_here);
    for (auto it = memory.begin(); it != memory.end();) {
        if (!lives_here(it->second)) {
            ++it;
            continue;
        }
        it = release_memory(*this, it, alive);
    }
    free_slots.push_back(context.legacy->slot);
    context.legacy.reset();
}

Stream& Driver::stream(CUstream handle) {
    Context& context = current();
    require(handle != CU_STREAM_PER_THREAD, CUDA_ERROR_NOT_SUPPORTED);
    if (handle == nullptr || handle == CU_STREAM_LEGACY) {
        // It waits for streams under capture, which therefore cannot go on.
        bool implicit = false;
        for (const auto& capture : captures) {
            for (const Stream* s : capture->streams)
                implicit |= s->blocking;
        }
        if (implicit) {
            for (const auto& capture : captures)
                invalidate(*capture);
            throw Failure{CUDA_ERROR_STREAM_CAPTURE_IMPLICIT};
        }
        return *context.legacy;
    }
    Stream& found = streams.get(handle);
    require(found.context == &context, CUDA_ERROR_INVALID_HANDLE);
    return found;
}

void Driver::submit(Stream& stream, Kind kind, std::initializer_list<Part> parts, Module* module) {
    if (stream.capture) {
        capture_node(stream, kind, parts, module);
        return;
    }
    std::vector<Point> points;
    auto follow = [&](const Stream& other) {
        const uint64_t sequence = last[other.slot];
        if (&other != &stream && !gpu.done(other.slot, sequence))
            points.push_back({other.slot, sequence});
    };
    if (stream.legacy) {
        for (const auto& [handle, other] : streams) {
            if (other->blocking && other->context == stream.context) follow(*other);
        }
    } else if (stream.blocking) {
        follow(*stream.context->legacy);
    }
    // Counts as no operation of its own, so that the next number is the one note_use() gave.
    if (!points.empty())
        gpu.send(Kind::wait, stream.slot, last[stream.slot],
                 {{points.data(), points.size() * sizeof(Point)}});
    gpu.send(kind, stream.slot, last[stream.slot] + 1, parts);
    last[stream.slot]++;
    if (module) module->uses[stream.slot] = last[stream.slot];
}

bool Driver::pending(const Uses& uses) const {
    return std::any_of(uses.begin(), uses.end(),
                       [&](const auto& use) { return !gpu.done(use.first, use.second); });
}

CUresult Driver::wait(std::unique_lock<std::mutex>& lock, uint32_t slot) {
    const uint64_t sequence = last[slot];
    lock.unlock();
    const CUresult result = gpu.wait(slot, sequence);
    lock.lock();
    return result;
}

CUresult Driver::wait_all(std::unique_lock<std::mutex>& lock, const Context& context) {
    std::vector<std::pair<uint32_t, uint64_t>> points = {
        {context.legacy->slot, last[context.legacy->slot]}};
    for (const auto& [handle, stream] : streams) {
        if (stream->context == &context) points.emplace_back(stream->slot, last[stream->slot]);
    }
    lock.unlock();
    CUresult result = CUDA_SUCCESS;
    for (const auto& [slot, sequence] : points) {
        if (result == CUDA_SUCCESS) result = gpu.wait(slot, sequence);
    }
    lock.lock();
    return result;
}

uint32_t Driver::take_slot() {
    require(!free_slots.empty(), CUDA_ERROR_OUT_OF_MEMORY);
    // One with nothing left to do, if there is one: what a destroyed stream had queued still runs.
    auto idle = std::find_if(free_slots.rbegin(), free_slots.rend(),
                             [&](uint32_t slot) { return gpu.done(slot, last[slot]); });
    const auto chosen = idle == free_slots.rend() ? free_slots.begin() : std::prev(idle.base());
    const uint32_t slot = *chosen;
    free_slots.erase(chosen);
    return slot;
}

void Driver::configure_gpu() {
    if (!gpu.started()) return;
    const Configuration configuration = {
        settings.delay_us,
        settings.seed,
        settings.watchdog_ms,
        settings.clock_rate,
        settings.multiprocessors,
        static_cast<uint64_t>(threads_per_multiprocessor(settings.capability))};
    gpu.send(Kind::configure, 0, 0, {{&configuration, sizeof configuration}});
}

CUresult Driver::complain(CUresult code, const std::string& what) {
    complaint = what;
    std::fprintf(stderr, "stand-in driver: %s\n", what.c_str());
    throw Failure{code};
}

}  // namespace standin
