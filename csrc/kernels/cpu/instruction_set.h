// The namespace of the code that is being compiled: NORMFUSED_INSTRUCTION_SET is baseline, avx2 or avx512.
//
// avx2/ and avx512/ hold one file per kernel file: they set the target and the name, then include the kernel's source.
// Nothing but the entry points may have external linkage there: the linker keeps one copy of a shared inline function,
// and an AVX-512 copy would crash an older CPU.
#pragma once

#ifndef NORMFUSED_INSTRUCTION_SET
#define NORMFUSED_INSTRUCTION_SET baseline
#endif
