#!/usr/bin/env bash
# One-machine SLURM cluster for tests and CI: munged + (mariadbd + slurmdbd) + slurmctld + N slurmd,
# no systemd, everything on loopback, every file under $SLURM_SIM_DIR.
#
#   slurm_cluster.sh install            apt-get the packages (once)
#   slurm_cluster.sh start [--no-db]    idempotent; returns when every node is idle and srun answers
#   slurm_cluster.sh stop               idempotent; ends only processes whose pid files it owns
#   slurm_cluster.sh status|env|wipe
#   slurm_cluster.sh node-kill nN [crash|slurmd] | node-start nN     fault injection: node crash, or slurmd alone; restart
#   slurm_cluster.sh ctld-kill | ctld-start | db-kill | db-start     the controller, the accounting daemon
set -euo pipefail
HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
D=${SLURM_SIM_DIR:-/tmp/slurm-sim}
NODES=${SLURM_SIM_NODES:-5}          # virtual nodes n1..nN, at least 4: the last ones are the partition `spare`
CPUS=${SLURM_SIM_CPUS:-2}            # declared CPUs per node (oversubscribed)
MEM=${SLURM_SIM_MEM:-16000}          # declared MiB per node
GPUS=${SLURM_SIM_GPUS:-4}            # declared (fake) GPUs per node
PORT=${SLURM_SIM_PORT:-26817}        # slurmctld; slurmdbd = PORT+2; slurmd = PORT+100+i
DB=1
HOST=$(hostname -s)
CONF=$D/etc/slurm.conf
export SLURM_CONF=$CONF

log()  { printf '%s\n' "$*" >&2; }
die()  { log "slurm_cluster: $*"; exit 1; }
alive() { # alive PIDFILE NAME -> true when the pid in the file is a live process called NAME
  local p; p=$(cat "$1" 2>/dev/null) || return 1
  # "PID (NAME) STATE ...": a zombie (a PID 1 that reaps late) is dead
  [[ -n $p && $(cat "/proc/$p/stat" 2>/dev/null) == "$p ($2"*") "[!ZX]* ]]
}
wait_for() { # wait_for SECONDS CMD...
  local end=$(( $(date +%s%N) + $1*1000000000 )); shift
  until "$@" >/dev/null 2>&1; do
    (( $(date +%s%N) < end )) || return 1; sleep 0.05
  done
}
end_pid() { # end_pid PIDFILE NAME SECONDS
  alive "$1" "$2" || { rm -f "$1"; return 0; }
  local p; p=$(cat "$1"); kill -TERM "$p" 2>/dev/null || true
  local end=$(( $(date +%s%N) + $3*1000000000 ))
  while alive "$1" "$2"; do
    if (( $(date +%s%N) > end )); then kill -KILL "$p" 2>/dev/null || true; break; fi
    sleep 0.05
  done
  rm -f "$1"
}

install_pkgs() {
  local need=()
  for b in slurmctld:slurmctld slurmd:slurmd srun:slurm-client slurmdbd:slurmdbd munged:munge mariadbd:mariadb-server ss:iproute2; do
    command -v "${b%%:*}" >/dev/null || [[ -x /usr/sbin/${b%%:*} ]] || need+=("${b##*:}")
  done
  (( ${#need[@]} )) || return 0
  export DEBIAN_FRONTEND=noninteractive
  # The packages would start services of their own where a service manager runs.
  local policy=/usr/sbin/policy-rc.d
  [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap "rm -f $policy" RETURN; }
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${need[@]}" slurm-wlm-basic-plugins >/dev/null
}

write_conf() {
  mkdir -p "$D"/{etc,run,log,state,spool,dev,munge}
  chmod 755 "$D" "$D"/{etc,run,log,state,spool}
  chmod 700 "$D/munge"
  chmod 755 "$D/run"
  [[ -s $D/munge/munge.key ]] || { dd if=/dev/urandom of="$D/munge/munge.key" bs=128 count=1 status=none; chmod 400 "$D/munge/munge.key"; }
  local i; for ((i=0;i<GPUS;i++)); do [[ -c $D/dev/gpu$i ]] || { rm -f "$D/dev/gpu$i"; mknod "$D/dev/gpu$i" c 1 3; }; done
  sed -e "s#@D@#$D#g; s#@HOST@#$HOST#g; s#@PORT@#$PORT#g; s#@DBPORT@#$((PORT+2))#g" \
      -e "s#@N@#$NODES#g; s#@CPUS@#$CPUS#g; s#@MEM@#$MEM#g; s#@GPUS@#$GPUS#g" \
      -e "s#@NPORTS@#[$((PORT+101))-$((PORT+100+NODES))]#g" \
      -e "s#@ACCT@#$([[ $DB == 1 ]] && echo slurmdbd || echo none)#g" "$HERE/slurm.conf.in" >"$CONF.new"
  (( DB )) || sed -i -e '/^AccountingStorageHost/d;/^AccountingStoragePort/d;/^AccountingStoragePass/d;/^AccountingStorageTRES/d' "$CONF.new"
  mv "$CONF.new" "$CONF"
  if (( GPUS )); then echo "NodeName=n[1-$NODES] Name=gpu File=$D/dev/gpu[0-$((GPUS-1))]" >"$D/etc/gres.conf"; fi
  printf 'CgroupMountpoint=/sys/fs/cgroup\n' >"$D/etc/cgroup.conf"
  if (( DB )); then
    sed -e "s#@D@#$D#g; s#@HOST@#$HOST#g; s#@DBPORT@#$((PORT+2))#g" "$HERE/slurmdbd.conf.in" >"$D/etc/slurmdbd.conf"
    chmod 600 "$D/etc/slurmdbd.conf"
  fi
  # clients started from a job step lose SLURM_CONF (the snakemake jobstep plugin drops SLURM_*),
  # so the default path must lead to this cluster too
  mkdir -p /etc/slurm
  if [[ ! -e /etc/slurm/slurm.conf || -L /etc/slurm/slurm.conf ]]; then ln -sfn "$CONF" /etc/slurm/slurm.conf; fi
}

hosts() { # the node names must resolve (MASTER_ADDR of torch.distributed / submitit is a node name)
  local names; names=$(seq -f 'n%g' -s ' ' 1 "$NODES")
  getent hosts "n$NODES" >/dev/null 2>&1 || printf '127.0.0.1 %s # slurm_cluster.sh\n' "$names" >>/etc/hosts 2>/dev/null || log "node names do not resolve"
}

start_munge() {
  alive "$D/run/munged.pid" munged && return 0
  # munged insists on owning its files; run it as this user
  /usr/sbin/munged --force --key-file="$D/munge/munge.key" --socket="$D/run/munge.socket" \
     --pid-file="$D/run/munged.pid" --log-file="$D/munge/munged.log" --seed-file="$D/munge/seed" --num-threads=4
  wait_for 10 munge -S "$D/run/munge.socket" -n || die "munged did not answer (see $D/munge/munged.log)"
}

start_db() {
  (( DB )) || return 0
  if ! alive "$D/run/mariadbd.pid" mariadbd; then
    if [[ ! -d $D/mysql/mysql ]]; then
      mkdir -p "$D/mysql"; chown mysql: "$D/mysql"
      mariadb-install-db --no-defaults --user=mysql --datadir="$D/mysql" --skip-test-db \
        --auth-root-authentication-method=normal >"$D/log/mariadb-install.log" 2>&1 || die "mariadb-install-db failed"
    fi
    mkdir -p "$D/run/mysql"; chown mysql: "$D/run/mysql"
    setsid /usr/sbin/mariadbd --no-defaults --user=mysql --datadir="$D/mysql" --socket="$D/run/mysql/sock" \
      --skip-networking --pid-file="$D/run/mysql/pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
      --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin --performance-schema=0 \
      </dev/null >"$D/log/mariadbd.log" 2>&1 &
    echo $! >"$D/run/mariadbd.pid"
    wait_for 30 mariadb-admin --no-defaults -S "$D/run/mysql/sock" -u root ping || die "mariadbd did not answer"
    mariadb --no-defaults -S "$D/run/mysql/sock" -u root -e \
      "create database if not exists slurm_acct_db; create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;"
  fi
  if ! alive "$D/run/slurmdbd.pid" slurmdbd; then
    MYSQL_UNIX_PORT=$D/run/mysql/sock SLURM_CONF=$CONF setsid /usr/sbin/slurmdbd -D </dev/null >"$D/log/slurmdbd.out" 2>&1 &
    echo $! >"$D/run/slurmdbd.pid"
    wait_for 30 sacctmgr -n -i show cluster || die "slurmdbd did not answer (see $D/log/slurmdbd.log)"
    sacctmgr -n show cluster format=cluster | grep -qw sim || sacctmgr -i -Q add cluster sim >/dev/null
    sacctmgr -n show account lab format=account | grep -qw lab || sacctmgr -i -Q add account lab Description=lab Organization=lab >/dev/null
    sacctmgr -n show user "$(id -un)" withassoc format=account | grep -qw lab || sacctmgr -i -Q add user "$(id -un)" Account=lab DefaultAccount=lab >/dev/null
  fi
}

start_ctld() {
  alive "$D/run/slurmctld.pid" slurmctld && return 0
  /usr/sbin/slurmctld -f "$CONF" "$@" </dev/null >"$D/log/slurmctld.out" 2>&1 || { cat "$D/log/slurmctld.out" >&2; die "slurmctld failed"; }
  wait_for 20 scontrol ping || die "slurmctld did not answer (see $D/log/slurmctld.log)"
}
start_node() {
  alive "$D/run/slurmd.$1.pid" slurmd && return 0
  mkdir -p "$D/spool/$1"
  /usr/sbin/slurmd -f "$CONF" -N "$1" </dev/null >"$D/log/slurmd.$1.out" 2>&1 || { cat "$D/log/slurmd.$1.out" >&2; die "slurmd $1 failed"; }
}
all_idle() { [[ $(sinfo -h -N -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l) == "$NODES" ]]; }

start() {
  [[ ${1:-} == --no-db ]] && DB=0
  write_conf; hosts
  start_munge; start_db; start_ctld
  local i; for ((i=1;i<=NODES;i++)); do start_node "n$i"; done
  if ! wait_for 30 all_idle; then
    scontrol update nodename="n[1-$NODES]" state=resume 2>/dev/null || true
    wait_for 20 all_idle || { sinfo -N -l >&2; die "nodes did not become idle"; }
  fi
  timeout 30 srun -p main -N1 -n1 -t 1 true || die "srun did not answer"
}
stop() {
  if alive "$D/run/slurmctld.pid" slurmctld; then
    timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
    local end=$(( $(date +%s) + 8 ))
    while [[ -n $(timeout 3 squeue -h -o %i 2>/dev/null) && $(date +%s) -lt $end ]]; do sleep 0.1; done
  fi
  local f
  for f in "$D"/run/slurmd.*.pid; do [[ -e $f ]] && end_pid "$f" slurmd 5; done
  f=$(step_pids "$D/spool/"); [[ -z $f ]] || kill -KILL $f 2>/dev/null || true
  end_pid "$D/run/slurmctld.pid" slurmctld 10
  end_pid "$D/run/slurmdbd.pid" slurmdbd 10
  end_pid "$D/run/mariadbd.pid" mariadbd 15
  end_pid "$D/run/munged.pid" munged 5
  if [[ -L /etc/slurm/slurm.conf && $(readlink /etc/slurm/slurm.conf) == "$CONF" ]]; then rm -f /etc/slurm/slurm.conf; fi
  if grep -q '# slurm_cluster.sh$' /etc/hosts; then # in place: /etc/hosts may be a bind mount
    local kept; kept=$(grep -v '# slurm_cluster.sh$' /etc/hosts); printf '%s\n' "$kept" >/etc/hosts
  fi
  return 0
}
step_pids() { # slurmstepds listen on unix sockets in the spool directory of their node
  ss -xlpH 2>/dev/null | grep -F "$1" | grep -o 'pid=[0-9]*' | cut -d= -f2 | sort -u | tr '\n' ' ' || true
}
node_kill() { # node_kill nN crash|slurmd : crash = slurmd + its slurmstepds + their tasks at once
  local p pids
  pids=$(cat "$D/run/slurmd.$1.pid")
  if [[ $2 == crash ]]; then
    pids+=" $(step_pids "$D/spool/$1/")"   # and the tasks, which carry the node's name:
    for p in /proc/[0-9]*; do
      if grep -qz "^SLURMD_NODENAME=$1\$" "$p/environ" 2>/dev/null; then pids+=" ${p#/proc/}"; fi
    done
  fi
  kill -KILL $pids 2>/dev/null || true
  rm -f "$D/run/slurmd.$1.pid"
}
case ${1:-} in
  install) install_pkgs;;
  start) shift; start "$@";;
  stop) stop;;
  restart) shift; stop; start "$@";;
  wipe) stop; rm -rf "$D";;
  status) sinfo -N -o "%N %P %T %C %m %G"; squeue;;
  env) echo "export SLURM_CONF=$CONF";;
  node-kill) node_kill "$2" "${3:-crash}";;
  node-start) start_node "$2";;
  ctld-kill) kill -KILL "$(cat "$D/run/slurmctld.pid")"; rm -f "$D/run/slurmctld.pid";;
  ctld-start) start_ctld;;
  db-kill) kill -KILL "$(cat "$D/run/slurmdbd.pid")"; rm -f "$D/run/slurmdbd.pid";;
  db-start) start_db;;
  *) sed -n 2,13p "$0"; exit 2;;
esac
