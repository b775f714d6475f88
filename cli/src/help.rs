//! Examples under each command's help.

pub const TOP: &str = "\
Examples:
  berth model push iris:1 ./model.onnx --alias champion
  berth plan  -f iris.yaml         what would happen, and where
  berth apply -f iris.yaml         make it so, and wait until it is
  berth ps                         what runs, and why something does not
  berth infer iris --input sample.json
  berth logs -f iris               all replicas in one stream

Data goes to standard output, everything else to standard error. Text from hosts and programs is
escaped on a terminal and raw in a pipe. NO_COLOR turns colours off.

Exit codes: 0 done, 1 the request cannot be, 2 command line, 3 server not reached,
4 not permitted, 5 rollout failed or not complete by --timeout, 6 rollout done but hosts deferred
(with --wait-all).";

pub const APPLY: &str = "\
Examples:
  berth apply -f iris.yaml                       wait for the rollout, showing each replica
  berth apply -f fleet/ -f extra.yaml            files and folders, all or nothing
  berth deployment show iris -o yaml | berth apply -f -      changes nothing
  berth apply -f iris.yaml --no-wait             return when it is written
  berth apply -f iris.yaml --wait-all            also wait for hosts that are away

Hosts that are away block nothing: they are told apart and get the release when they return. With
--wait-all they are waited for, and 6 is the exit code when they have not returned by --timeout.
A rollout that fails goes back by itself (rollout.onFailure); the exit code is then 5. It is 5, too,
when the rollout is not complete by --timeout: what was written stays, the rollout goes on, and
`rollout` in -o json is \"rolling\". A manifest that changes nothing is waited for as well, until as
many replicas are ready as are wanted. A server that restarts meanwhile is waited for. Ctrl-C ends
the waiting and nothing else, with 130.
deploy/examples/all-options.yaml explains every field.";

pub const PLAN: &str = "\
Examples:
  berth plan -f iris.yaml             fields that would change, and the hosts that would be chosen
  berth plan -f iris.yaml -o json     the same for programs

Nothing is written.";

pub const PS: &str = "\
Examples:
  berth ps                       everything you may see
  berth ps iris -o wide          with replica and container ids
  berth ps -l team=vision        deployments with this label
  berth ps --host edge-7
  berth ps -o json | jq -r '.[] | select(.ready | not) | .message'

Slots that wait for a host are rows of their own: for programs with `state` \"pending\", `slots` (how
many), `reason` and `message`, and null in place of `uid`, `slot` and `host`.";

pub const LOGS: &str = "\
Examples:
  berth logs iris                          what all replicas have said
  berth logs -f iris --tail 20             the last lines of each, and then what comes
  berth logs iris --since 10m --timestamps
  berth logs iris --host edge-7 --previous what the attempt before the present one said

Each line names its source, DEPLOYMENT/SLOT HOST. A host that cannot be reached is named on standard
error and ends nothing. With -f new replicas join in, and after a break the stream goes on where it
was, without lines twice.";

pub const SCALE: &str = "\
Examples:
  berth scale iris 5
  berth scale iris 3 --wait      until three are ready
  berth scale iris 0             nothing runs, the deployment stays";

pub const RM: &str = "\
Examples:
  berth rm iris
  berth rm iris --yes            without being asked

It ends when every host has confirmed that nothing of it is left.";

pub const INFER: &str = "\
Examples:
  berth infer iris --input sample.json
  echo '{\"inputs\":[{\"name\":\"x\",\"datatype\":\"FP32\",\"shape\":[1,4],\"data\":[5.1,3.5,1.4,0.2]}]}' |
    berth infer iris --input -
  berth infer iris --input sample.json --expect expected.json

The input is JSON in the strict sense, without NaN and Infinity, which some programs write; what is
no JSON is not sent.";

pub const BUILD: &str = "\
Examples:
  berth build -t vision/iris-app:1.2 ./iris-app
  berth build -t iris-app:dev . --file docker/Dockerfile --build-arg PY=3.12 --alias candidate

The engine of DOCKER_HOST, or the local one, builds the folder; what .dockerignore names stays out.
The image is pushed to Berth's registry and registered with the folder's git commit, branch and
whether there were changes. A version that is there is refused before it is pushed, unless the build
gave the same digest; the aliases move then. Engines date what they build, and nothing of this is
left in them, so the same folder mostly gives another digest: `berth model alias` moves an alias
alone. `docker build` and `docker push` work just as well.";

pub const EVENTS: &str = "\
Examples:
  berth events                          what happened of late
  berth events -f --deployment iris     and what happens, also over a restart of the server
  berth events --since 1h -o json";

pub const AUDIT: &str = "\
Examples:
  berth audit list
  berth audit list --filter 'actor=user/vera AND method=*/Apply' --limit 1000 -o json

For admins. Every write is there with its actor, address, call and what it was about.";

pub const EXEC: &str = "\
Examples:
  berth exec iris -- /berth-runtime --version      in any running replica
  berth exec -t app -- sh                          with a terminal, where the image has a shell
  cat x.json | berth exec app --replica 0192 -- python ask.py

The program must be in the image; that of the ONNX runtime holds nothing but the runtime itself. The
exit code is the program's. Needs the permission to run commands (`berth user create --exec`).";

pub const TOP_COMMAND: &str = "\
Examples:
  berth top                      hosts: what is reserved of what there is
  berth top replicas             replicas: processor and memory in use now
  berth top replicas iris -o json";

pub const DEPLOYMENT: &str = "\
Examples:
  berth deployment list -l team=vision
  berth deployment show iris                     with its status
  berth deployment show iris -o yaml > iris.yaml a manifest that can be applied again
  berth deployment restart iris
  berth deployment rollout status iris
  berth deployment rollout undo iris --to 3";

pub const RELEASE: &str = "\
Examples:
  berth release list iris
  berth release show iris 3 -o yaml";

pub const HOST: &str = "\
Examples:
  berth host token create --label zone=eu        prints the command to run on the new host
  berth host list -l zone=eu -o wide
  berth host label edge-7 zone=eu maintenance-
  berth host drain edge-7                        move away what is there
  berth host rm edge-7";

pub const TOKEN: &str = "\
Examples:
  berth host token create --ttl 24h --uses 50 --label site=berlin --require-approval
  berth host token create --rejoin edge-7        for a host that was set up anew
  berth host token list";

pub const ORPHAN: &str = "\
Examples:
  berth orphan list
  berth orphan adopt --host edge-7               all that can be taken in
  berth orphan release 0190f3c2-7d1a-7f00-8000-2a41c1b0e7aa

Since a restore from a backup a host gets nothing new to do as long as it runs something that the
restored ledger does not know. What is adopted goes on running; what is released is stopped. What
was deployed after the backup is not known at all: release it, then apply its manifest again. A host
with orphans that nobody has decided about takes nothing new.";

pub const BACKUP: &str = "\
Examples:
  berth backup monday.age --recovery-key recovery.key    the first backup gives out the key, once
  berth backup tuesday.age
  berthd restore monday.age --data-dir DIR --recovery-key-file recovery.key

The file holds the ledger and the key of the cluster's CA, encrypted to the recovery key, and is
readable by its owner alone. The bytes of models and images are not in it: copy the folder `registry` of
the server's data folder as well. Keep the recovery key apart from the backups; without it no backup
can be restored.";

pub const MODEL: &str = "\
Examples:
  berth model push iris:2 ./model.onnx --alias challenger --metric accuracy=0.97
  berth model list
  berth model show iris                  its versions
  berth model show iris@champion         one version, with inputs, outputs and lineage
  berth model alias iris:2 champion --why 'won the shadow test'
  berth model history iris               who moved which alias when, and why";

pub const MODEL_PUSH: &str = "\
Examples:
  berth model push iris:1 ./model.onnx --alias champion
  berth model push speech/asr:2024-06 ./saved_model --param lr=0.001 --metric wer=0.081 \\
    --parent speech/asr:2024-05 --dataset s3://corpora/v7 --license Apache-2.0

The files become one CNCF ModelPack artifact, each file a layer. Git commit, branch and whether there
were changes are remembered when the files are in a git work tree. Files that the registry has are
not sent again; an upload that breaks off goes on where it was, also by the same command again.";

pub const IMAGE: &str = "\
Examples:
  berth image push my-runtime:latest runtimes/onnx:latest
  berth image list                       what the registry has, also models
  berth image tags runtimes/onnx";

pub const USER: &str = "\
Examples:
  berth user create ci --role operator -n vision --expires 90d --out ci.toml
  berth user token ci                    for docker login, curl and the gateway
  berth user token ci --deployment iris --expires 30d     for one deployment's gateway only
  berth user revoke ci --token 4f1c2d3e5a6b               that one; berth_ID_... names it
  berth user revoke ci";

pub const CONTEXT: &str = "\
Examples:
  berth context create lab --from ./admin.toml   take over what `berth user create` printed
  berth context list
  berth context use lab
  berth context renew                            a new certificate, and the roots that there are now
  berth --context lab ps";

pub const ROOT: &str = "\
Examples:
  berth root list
  berth root rotate && berth context renew       then back up, and wait until `list` names nobody
  berth root finish
  berth root export > berth-roots.pem            what docker, curl and grpcurl trust

Hosts learn the new root by themselves, and renew their certificates with it; those that are away do so
when they are back. People run `berth context renew`, once each. Other clients (docker, curl) are given
what `export` prints. People's tokens stay good, join tokens end. A backup from before `rotate` shuts
out hosts that have renewed since: make a new one after each step.";

pub const COMPLETION: &str = "\
Examples:
  source <(berth completion bash)
  berth completion zsh > ~/.zfunc/_berth
  berth completion fish > ~/.config/fish/completions/berth.fish";
