// Empty on purpose: the name and the dependency of this library are what it is for (see CMakeLists.txt).
