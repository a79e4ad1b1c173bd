# torch, as a list pins it, into an environment: sh config/torch.sh PYTHON LIST BUILD [pip's options]
#
# On Linux plain pip brings the build with CUDA. uv knows where the build for the CPU is, so it
# fetches that; where pip has been told where to look, torch comes from there.
python=$1 list=$2 build=$3
shift 3
torch=$(grep '^torch==' "$list")
version=${torch#torch==}

"$python" -m pip show torch 2>/dev/null | grep -qE "^Version: $version(\+.*)?$" && exit

if [ "$build" = pip ]; then
  [ "$(uname -s)" != Linux ] || echo "As pip has it, mostly with CUDA: 2.7 GB (0.2 GB: TORCH=cpu)."
elif { echo "$*"; "$python" -m pip config list; } | grep -qE 'index|find.links|^-f| -f'; then
  echo "From where pip is told to look."
else
  [ "$build" != cpu ] || echo "The build for the CPU, fetched by uv: 0.2 GB."
  "$python" -m pip install "$@" "$(grep '^uv==' requirements-extras.txt)" &&
    "$python" -m uv pip install --quiet --python "$python" --torch-backend "$build" "$torch" &&
    exit
  echo "That failed. Plain pip may have another build; on Linux mostly with CUDA, 2.7 GB."
  if [ -t 0 ]; then
    printf 'Go on with plain pip? [y/N] '
    read -r answer
    [ "$answer" = y ] || exit 1
  fi
fi
"$python" -m pip install "$@" "$torch"
