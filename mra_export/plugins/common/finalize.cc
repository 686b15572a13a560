// What crtbeginS.o brings to a library, where the linker brings none (cmake/zig.cmake): closing the library calls what it
// registered with atexit, destructors of its static objects among it. Else the end of the process calls it, when the code is gone.
extern "C" {
void __cxa_finalize(void*);
// atexit hands on the value, compilers the address.
__attribute__((visibility("hidden"))) void* __dso_handle = &__dso_handle;
}

namespace {
__attribute__((destructor)) void Finalize() { __cxa_finalize(__dso_handle); }
}  // namespace
