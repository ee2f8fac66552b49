// Addresses of tensors, as Python hands them in. Python keeps the memory alive, and checks type and layout
// (ops/native.py).
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <type_traits>

namespace gemma {

// The address of some T, or null. Python sees a number with the name of its type.
template <class T>
struct At {
    T* address = nullptr;
    operator T*() const { return address; }
};

}  // namespace gemma

namespace nanobind::detail {

template <class T>
constexpr auto address_name() {
    using Element = std::remove_const_t<T>;
    if constexpr (std::is_same_v<Element, float>) return const_name("Floats");
    else if constexpr (std::is_same_v<Element, int64_t>) return const_name("Int64s");
    else if constexpr (std::is_same_v<Element, int32_t>) return const_name("Int32s");
    else return const_name("Bytes");
}

template <class T>
struct type_caster<gemma::At<T>> {
    NB_TYPE_CASTER(gemma::At<T>, address_name<T>())

    bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
        make_caster<uintptr_t> number;
        if (!number.from_python(source, flags, cleanup)) return false;
        value.address = reinterpret_cast<T*>(number.value);
        return true;
    }
    static handle from_cpp(gemma::At<T> at, rv_policy policy, cleanup_list* cleanup) noexcept {
        return make_caster<uintptr_t>::from_cpp(reinterpret_cast<uintptr_t>(at.address), policy, cleanup);
    }
};

}  // namespace nanobind::detail
