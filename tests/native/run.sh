#!/usr/bin/env bash
# The native kernels by themselves.
#   run.sh sanitize   C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, then every op's cases through the same build
#   run.sh arm        cross-compile for aarch64 (evidence: compiled) and look for its vector instructions
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../backends/cpu/native
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
CXX=${CXX:-g++}

compile_all() {  # compiler words... : objects of all sources into $scratch, two at a time
    export scratch
    printf '%s\n' "$native"/*.cpp | xargs -P 2 -I{} sh -c '"$@" -c "$0" -o "$scratch/$(basename "$0" .cpp).o"' {} "$@"
}

sanitize() {
    local flags=(-std=c++17 -O1 -g1 -fPIC -fno-math-errno -fsanitize=address,undefined -fno-sanitize-recover=all -DV4_AMX_EMULATED)
    compile_all "$CXX" "${flags[@]}"
    "$CXX" "${flags[@]}" -Wall -Wextra "$here/kernels_test.cpp" "$scratch"/*.o -o "$scratch/test" -pthread
    "$scratch/test"
    "$CXX" "${flags[@]}" -shared "$scratch"/*.o -o "$scratch/kernels.so" -pthread
    local level
    for level in ${V4SDK_TEST_LEVELS:-$(python -c 'from importlib import import_module as i; print(*i("v4sdk_cpu.kernels").native_library().levels, "amx_emulated")')}; do
        # torch is not built for it, so the sanitizer's library has to come first
        LD_PRELOAD=$("$CXX" -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 V4SDK_CPU_LIBRARY=$scratch/kernels.so \
            V4SDK_CPU_LEVEL=$level V4SDK_CPU_THREADS=3 python -m v4sdk conformance --backend cpu | tail -n 1
    done
}

arm() {
    compile_all python -m ziglang c++ -target aarch64-linux-gnu -std=c++17 -O2 -fPIC -fno-math-errno
    python -m ziglang c++ -target aarch64-linux-gnu -shared "$scratch"/*.o -o "$scratch/kernels.so" -lpthread
    python - "$scratch/kernels.so" <<'PY'
import pathlib, struct, sys
data = pathlib.Path(sys.argv[1]).read_bytes()
machine = struct.unpack_from("<H", data, 18)[0]
assert machine == 183, f"machine {machine}, expected 183 (aarch64)"
# fmla of four float32: 0 1 0 01110 0 0 1 Rm 110011 Rn Rd
words = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
count = sum(word & 0xFFE0FC00 == 0x4E20CC00 for word in words)
assert count > 100, f"{count} vector multiply-adds, expected hundreds"
print(f"aarch64: {len(data):,} bytes, {count} vector multiply-adds; evidence: compiled")
PY
}

"${1:?expected sanitize or arm}"
