// torch.ops.simsd_emulated.*: what tests ask of the emulation itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cuda/device.h"
#include "cuda/emulation/launch.h"

namespace {

void set_schedule(int64_t seed) { simsd::emulation::set_schedule(static_cast<uint64_t>(seed)); }

void set_multiprocessors(int64_t count) { simsd::emulation::set_multiprocessors(static_cast<int>(count)); }

void set_noting(bool on) { simsd::emulation::set_noting(on); }

void set_counting(int64_t most_blocks) { simsd::emulation::set_counting(most_blocks); }

std::string take_notes() { return simsd::emulation::take_notes(); }

// JSON: what kernels did since the last call.
std::string take_counters() {
    const simsd::emulation::Counters c = simsd::emulation::counters;
    simsd::emulation::counters = {};
    return "{\"launches\": " + std::to_string(c.launches) + ", \"blocks\": " + std::to_string(c.blocks) +
           ", \"matrix_products\": " + std::to_string(c.matrix_products) +
           ", \"async_bytes\": " + std::to_string(c.async_bytes) +
           ", \"loaded_bytes\": " + std::to_string(c.loaded_bytes) +
           ", \"stored_bytes\": " + std::to_string(c.stored_bytes) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simsd_emulated, m) {
    m.def("set_schedule(int seed) -> ()");
    m.def("set_multiprocessors(int count) -> ()");
    m.def("take_counters() -> str");
    m.def("set_noting(bool on) -> ()");
    m.def("set_counting(int most_blocks) -> ()");
    m.def("take_notes() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(simsd_emulated, CompositeExplicitAutograd, m) {
    m.impl("set_schedule", TORCH_BOX(&set_schedule));
    m.impl("set_multiprocessors", TORCH_BOX(&set_multiprocessors));
    m.impl("take_counters", TORCH_BOX(&take_counters));
    m.impl("set_noting", TORCH_BOX(&set_noting));
    m.impl("set_counting", TORCH_BOX(&set_counting));
    m.impl("take_notes", TORCH_BOX(&take_notes));
}
