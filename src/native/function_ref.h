// A reference to something that can be called. Unlike std::function, it allocates nothing: the thing must outlive it.
#pragma once

#include <type_traits>

namespace gemma {

template <class Signature>
class FunctionRef;

template <class Result, class... Arguments>
class FunctionRef<Result(Arguments...)> {
   public:
    template <class F>
        requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
    FunctionRef(const F& f)
        : object_(&f), call_([](const void* object, Arguments... arguments) -> Result {
              return (*(const F*)object)(arguments...);
          }) {}
    Result operator()(Arguments... arguments) const { return call_(object_, arguments...); }

   private:
    const void* object_;
    Result (*call_)(const void*, Arguments...);
};

}  // namespace gemma
