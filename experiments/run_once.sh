# For the scripts beside it: a run that may be asked for again, or in several terminals.

run_once() { # FOLDER, then what to train: trains and judges it; what is done is left, what was cut off goes on
  local folder=$1
  shift
  [ -e "$folder/result.json" ] && return
  if [ -e "$folder/checkpoints" ]; then
    metaheed train --resume "$folder" || return 0 # another terminal is at it
  elif [ ! -e "$folder" ]; then
    metaheed train "$@" --out "$folder"
  else
    echo "$folder has no checkpoint yet: another terminal has just begun it; if none has, remove it" >&2
    return 0
  fi
  metaheed evaluate "$folder" --tasks 600
}
