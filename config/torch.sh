# torch, in the version that a list pins, into an environment: sh torch.sh PYTHON LIST BUILD [pip's options]
#
# On Linux plain pip brings the build with CUDA. uv knows where the CPU build is, so it fetches it,
# unless pip has been told where to look: then torch comes from there.
python=$1 list=$2 build=$3
shift 3
torch=$(grep '^torch==' "$list")

if [ "$build" != pip ] && ! { echo "$*"; "$python" -m pip config list; } |
  grep -qE 'index|find.links'; then
  echo "The $build build, which uv fetches: 210 MB for cpu, gigabytes for a graphics card."
  "$python" -m pip install "$@" "$(grep '^uv==' requirements-extras.txt)" &&
    "$python" -m uv pip install --quiet --python "$python" --torch-backend "$build" "$torch" && exit
  echo "The $build build of torch could not be fetched. Plain pip may bring the one with CUDA: 2.7 GB."
  if [ -t 0 ]; then
    printf 'Go on with plain pip? [y/N] '
    read -r answer
    [ "$answer" = y ] || exit 1
  fi
elif [ "$build" = pip ] && [ "$(uname -s)" = Linux ]; then
  echo "As pip has it: on Linux usually with CUDA, 2.7 GB (TORCH=cpu for the small one)."
fi
"$python" -m pip install "$@" "$torch"
