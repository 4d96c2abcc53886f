// Streams and events.
#include "control.h"

using namespace standin;

namespace {

// Those of today's cards.
constexpr int highest_priority = -5, lowest_priority = 0;

CUresult create_stream(CUstream* handle, unsigned flags, int priority) {
    return api("cuStreamCreate", everything | never_captured, [&](Driver& d, auto&) {
        require(handle && flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
        // The driver clamps others, so that streams meant to differ do not.
        if (priority < highest_priority || priority > lowest_priority)
            return d.complain(CUDA_ERROR_INVALID_VALUE,
                              "cuStreamCreateWithPriority with a priority of " +
                                  std::to_string(priority) + ", beyond those there are");
        auto stream = std::make_unique<Stream>();
        stream->context = &d.current();
        stream->slot = d.take_slot();
        stream->blocking = flags == CU_STREAM_DEFAULT;
        stream->legacy = false;
        stream->priority = priority;
        *handle = d.streams.add(std::move(stream));
        return CUDA_SUCCESS;
    });
}

void require_no_capture(Driver& d, Stream& stream) {
    if (!stream.capture) return;
    d.invalidate(*stream.capture);
    throw Failure{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
}

Event& event_of(Driver& d, CUevent handle) {
    Event& event = d.events.get(handle);
    require(event.context == &d.current(), CUDA_ERROR_INVALID_HANDLE);
    return event;
}

void require_not_captured(Driver& d, Event& event) {
    if (!event.capture) return;
    d.invalidate(*event.capture);
    throw Failure{CUDA_ERROR_CAPTURED_EVENT};
}

CUresult value_operation(const char* name, Kind kind, CUstream handle, CUdeviceptr address,
                         uint32_t value, unsigned flags, unsigned flag_limit) {
    return api(name, everything, [&](Driver& d, auto&) {
        Stream& stream = d.stream(handle);
        require(flags < flag_limit && address % 4 == 0, CUDA_ERROR_INVALID_VALUE);
        require(d.device_readable(address, 4), CUDA_ERROR_INVALID_VALUE);
        d.note_use(stream, address);
        const Value operation = {address, value, flags};
        d.submit(stream, kind, {{&operation, sizeof operation}});
        return CUDA_SUCCESS;
    });
}

}  // namespace

STANDIN_API CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return create_stream(stream, flags, 0);
}

STANDIN_API CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return create_stream(stream, flags, priority);
}

STANDIN_API CUresult cuStreamDestroy_v2(CUstream handle) {
    return api("cuStreamDestroy_v2", everything | releases, [&](Driver& d, auto&) {
        require(handle && handle != CU_STREAM_LEGACY && handle != CU_STREAM_PER_THREAD,
                CUDA_ERROR_INVALID_HANDLE);
        Stream& stream = d.stream(handle);
        if (stream.capture) {
            d.invalidate(*stream.capture);
            stream.capture->streams.erase(&stream);
        }
        d.free_slots.push_back(stream.slot);  // what is queued there still runs
        d.streams.remove(handle);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuStreamSynchronize(CUstream handle) {
    return api("cuStreamSynchronize", everything, [&](Driver& d, auto& lock) {
        Stream& stream = d.stream(handle);
        require_no_capture(d, stream);
        return d.wait(lock, stream.slot);
    });
}

STANDIN_API CUresult cuStreamQuery(CUstream handle) {
    return api("cuStreamQuery", everything, [&](Driver& d, auto&) {
        Stream& stream = d.stream(handle);
        require_no_capture(d, stream);
        return d.gpu.done(stream.slot, d.last[stream.slot]) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    });
}

STANDIN_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    return api("cuStreamWaitEvent", everything, [&](Driver& d, auto&) {
        Stream& stream = d.stream(handle);
        Event& event = event_of(d, event_handle);
        require(flags <= 1, CUDA_ERROR_INVALID_VALUE);
        if (event.capture || stream.capture) {
            d.join_capture(stream, event);
        } else if (event.sequence != 0) {
            const Point point = {event.stream, event.sequence};
            d.submit(stream, Kind::wait, {{&point, sizeof point}});
        }
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                            unsigned flags) {
    return value_operation("cuStreamWaitValue32_v2", Kind::wait_value, stream, address, value,
                           flags, 4);
}

STANDIN_API CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                             unsigned flags) {
    return value_operation("cuStreamWriteValue32_v2", Kind::write_value, stream, address, value,
                           flags, 2);
}

STANDIN_API CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    return api("cuEventCreate", everything, [&](Driver& d, auto&) {
        require(handle && flags < 8, CUDA_ERROR_INVALID_VALUE);
        require(!d.free_events.empty(), CUDA_ERROR_OUT_OF_MEMORY);
        auto event = std::make_unique<Event>();
        event->context = &d.current();
        event->slot = d.free_events.back();
        event->timing = !(flags & CU_EVENT_DISABLE_TIMING);
        d.free_events.pop_back();
        *handle = d.events.add(std::move(event));
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    return api("cuEventRecord", everything, [&](Driver& d, auto&) {
        Stream& stream = d.stream(stream_handle);
        Event& event = event_of(d, handle);
        if (stream.capture) {
            require(!stream.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            event.capture = stream.capture;
            event.tail = stream.tail;
            return CUDA_SUCCESS;
        }
        event.capture.reset();
        d.submit(stream, Kind::record, {{&event.slot, sizeof event.slot}});
        event.stream = stream.slot;
        event.sequence = d.last[stream.slot];
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuEventQuery(CUevent handle) {
    return api("cuEventQuery", everything, [&](Driver& d, auto&) {
        Event& event = event_of(d, handle);
        require_not_captured(d, event);
        return d.gpu.done(event.stream, event.sequence) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    });
}

STANDIN_API CUresult cuEventSynchronize(CUevent handle) {
    return api("cuEventSynchronize", everything, [&](Driver& d, auto& lock) {
        Event& event = event_of(d, handle);
        require_not_captured(d, event);
        const uint32_t stream = event.stream;
        const uint64_t sequence = event.sequence;
        lock.unlock();
        return d.gpu.wait(stream, sequence);
    });
}

STANDIN_API CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return api("cuEventElapsedTime", everything, [&](Driver& d, auto&) {
        require(milliseconds, CUDA_ERROR_INVALID_VALUE);
        Event& a = event_of(d, start);
        Event& b = event_of(d, end);
        require_not_captured(d, a);
        require_not_captured(d, b);
        require(a.timing && b.timing && a.sequence && b.sequence, CUDA_ERROR_INVALID_HANDLE);
        require(d.gpu.done(a.stream, a.sequence) && d.gpu.done(b.stream, b.sequence),
                CUDA_ERROR_NOT_READY);
        const auto from = static_cast<int64_t>(d.gpu.event_time(a.slot));
        const auto to = static_cast<int64_t>(d.gpu.event_time(b.slot));
        *milliseconds = static_cast<float>(static_cast<double>(to - from) * 1e-6);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuEventDestroy_v2(CUevent handle) {
    return api("cuEventDestroy_v2", everything | releases, [&](Driver& d, auto&) {
        d.free_events.insert(d.free_events.begin(), event_of(d, handle).slot);
        d.events.remove(handle);
        return CUDA_SUCCESS;
    });
}
