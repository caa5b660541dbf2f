#!/bin/sh
# The Dockerfile's: a user id that the image does not know has no name and no home, and torch asks for both.
[ "${HOME:-/}" != / ] && [ -w "$HOME" ] || export HOME=/tmp
export LOGNAME="${LOGNAME:-$(id -un 2>/dev/null || id -u)}"
exec "$@"
