// NORMFUSED_INLINE: a function called inside of a loop over elements, which vectorises only if nothing is called there.
#pragma once

#define NORMFUSED_INLINE __attribute__((always_inline)) inline
