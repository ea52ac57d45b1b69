#!/bin/sh
# need_headers.sh CXX FLAGS - the build needs a C++ compiler, nlohmann/json and doctest: install Debian's packages, or say how.
cxx=$1
flags=$2
has() { echo "#include <$1>" | $cxx $flags -E -x c++ - >/dev/null 2>&1; }
missing=
command -v ${cxx%% *} >/dev/null || missing="$missing g++"
has nlohmann/json.hpp || missing="$missing nlohmann-json3-dev"
has doctest/doctest.h || missing="$missing doctest-dev"
[ -z "$missing" ] && exit 0
echo "missing packages:$missing" >&2
sudo=
[ "$(id -u)" = 0 ] || sudo="sudo -n"
if command -v apt-get >/dev/null && { [ -z "$sudo" ] || sudo -n true; } 2>/dev/null; then
    $sudo apt-get update -qq >/dev/null 2>&1
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null && exit 0
fi
echo "install them, then run make again:  sudo apt-get install$missing" >&2
exit 1
