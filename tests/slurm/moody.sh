#!/usr/bin/env bash
# moody.sh SEED DIR - writes squeue, scontrol and sbatch into DIR: they do what the real ones do, on a site's bad day.
#
# Of a hundred calls some thirty fail, before Slurm has heard them or after; fifteen take some seconds; thirty print a
# greeting first. Which ones follows from SEED and from how many calls of that command there were; DIR/moods says what
# happened.
set -eu
seed=$1 dir=$2
mkdir -p "$dir"
for name in squeue scontrol sbatch; do
  real=$(command -v "$name")
  cat >"$dir/$name" <<END
#!/usr/bin/env bash
printf . >>"$dir/calls-$name" # one byte each: writers do not mix
count=\$(stat -c %s "$dir/calls-$name")
mood=\$((\$(cksum <<<"$seed $name \$count" | cut -d ' ' -f 1) % 100))
fail() { echo "$name \$count: \$1: \$2" >>"$dir/moods"; echo "\$2" >&2; exit 1; }
case \$mood in
  [0-9]) fail before "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" ;;
  1[0-9]) sleep 1; fail before "$name: error: Batch job submission failed: Socket timed out on send/recv operation" ;;
  2[0-9]) "$real" "\$@" >/dev/null 2>&1; fail after "slurm_update error: Zero Bytes were transmitted or received" ;;
  3[0-4]) echo "$name \$count: slow" >>"$dir/moods"; sleep 3 ;;
  [3-6][0-9]) echo "$name \$count: greets" >>"$dir/moods"
    echo "-----------------------------------------------------------------"
    echo "          Welcome to the Stampede3 Supercomputer"
    echo "--> Verifying valid submit host (\$(hostname))...OK"
    echo "sbatch: your project expires in 12 days" >&2 ;;
esac
exec "$real" "\$@"
END
  chmod +x "$dir/$name"
done
