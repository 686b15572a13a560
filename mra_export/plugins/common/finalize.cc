// What a library does when it is closed, where the linker brings no crtbeginS.o that does it (cmake/zig.cmake): without it the
// destructors of its static objects would be left for the end of the process, and called when their code is gone.
extern "C" void __cxa_finalize(void*);
extern "C" __attribute__((visibility("hidden"))) void* __dso_handle;

namespace {
__attribute__((destructor)) void Finalize() { __cxa_finalize(&__dso_handle); }
}  // namespace
