// Which path a kernel file is being compiled for: the build passes -DSGLITE_CPU_PATH=avx512, avx2
// or portable. It is the namespace of the kernels and of every header they include, so that no
// inline function compiled for one instruction set is ever linked into another path.
#pragma once

#define SGLITE_QUOTE_(text) #text
#define SGLITE_QUOTE(text) SGLITE_QUOTE_(text)
#define SGLITE_CPU_PATH_NAME SGLITE_QUOTE(SGLITE_CPU_PATH)
