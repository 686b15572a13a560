#!/bin/sh
# sh optional.sh PART COMMAND...
# Runs COMMAND, which may fail: then .venv/left-out/PART keeps what it said, for left_out.py, and the exit status is 1.
part=$1
shift
mkdir -p .venv/left-out
if "$@" 2>".venv/left-out/$part"; then
  cat ".venv/left-out/$part" >&2
  rm ".venv/left-out/$part"
else
  cat ".venv/left-out/$part" >&2
  exit 1
fi
