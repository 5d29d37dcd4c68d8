// Compiled once per set of macros that other people's headers define: `-D SET_name`. The includes of the standard
// library come first where libstdc++ would undefine a macro, or where a program has its macros from a header that comes
// later.

#if defined(SET_complex)  // in gnu++20 it defines I
#include <complex.h>
#elif defined(SET_qt)  // <qobjectdefs.h>
#define emit
#define slots
#define signals public
#elif defined(SET_windows)  // <windows.h>, <rpcndr.h>
#include "standard.hpp"
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define near
#define far
#define small char
#elif defined(SET_asserts)  // <AssertMacros.h> and many projects
#define check(x) ((void)(x))
#define require(x) ((void)(x))
#define verify(x) ((void)(x))
#elif defined(SET_planted)  // a macro that the headers do trip over: the check can fail
#define Index
#else
#error "no such set of macros"
#endif

#include <coterie/coterie.hpp>
