# A change must pass `make test`; CI runs `make check`. Both fetch what they need.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

CARGO ?= cargo
DENY_VERSION := 0.20.2
DENY := target/tools/bin/cargo-deny

FUZZ_VERSION := 0.13.1
FUZZ := target/tools/bin/cargo-fuzz
FUZZ_SECONDS ?= 60

# Number of kills of `make crash-test`. STRANDLINE_SEED repeats the choices of a run.
KILLS ?= 200

# Duration of `make chaos`.
MINUTES ?= 10

# Duration of the etcd outage in `make outage`.
SECONDS ?= 600

# Input of `make sim`: number of seeds and first seed. TRACE=1 prints the trace of each seed, TRACE=live prints it during
# the run, and LOG=strandline=debug adds the brokers' log. SIM_SECONDS is the duration of `make sim-new`.
SEEDS ?= 200
SEED ?= 1
TRACE ?=
LOG ?=
SIM_SECONDS ?= 180

# Defects that `make mutants` plants: a part of their name.
MUTANT ?=

# Maximum number of states of each search of `make model`.
STATES ?= 2000000

# Searches of `make model`, or tests of `make sim`: a part of their name.
ONLY ?=

.PHONY: build release test check fmt clippy client docs deny hostile crash-test failover outage chaos sim sim-fixed sim-new mutants model bench streams fuzz fuzz-seeds golden protos etcd-protos kafka-reader real-s3 write-docs help

help: ## Prints this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: ## Builds the binary without optimisation.
	$(CARGO) build --locked

release: ## Builds the optimised binary: target/release/strandline.
	$(CARGO) build --locked --release

test: ## Runs every test, including those with real processes.
	tests/fetch-etcd >/dev/null
	$(CARGO) test --locked --no-fail-fast

check: fmt clippy client docs deny protos test sim-fixed sim-new ## Runs everything that CI runs.

fmt: ## Checks the format of the sources.
	$(CARGO) fmt --check

# The second call checks the simulator. Both packages together need the same features of each dependency as the first call, so no
# dependency is checked twice.
clippy: ## Runs clippy; a warning is an error.
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace --lib --test sim -- -D warnings

client: ## Checks that the client compiles alone, with none of the server's features.
	$(CARGO) clippy --locked --package strandline-client --lib -- -D warnings

docs: ## Builds the API documentation; a broken link is an error.
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

deny: $(DENY) ## Checks licences, duplicates and sources of all dependencies.
	$(DENY) --workspace check bans licenses sources

# Built without optimisation: the tool runs for seconds, and an optimised build takes minutes.
$(DENY):
	CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install --locked --debug --version $(DENY_VERSION) --root target/tools \
	  --target-dir target/tools/build cargo-deny
	rm -rf target/tools/build

protos: ## Checks that the stored descriptors of etcd-client's .proto files match the files.
	$(MAKE) --no-print-directory etcd-protos PROTOS_TO=target/tools/protos
	for file in etcd-client.fds etcd-client.sums; do cmp tools/$$file target/tools/protos/$$file; done

# The folder of the unpacked etcd-client crate.
ETCD_CLIENT = $(CARGO) metadata --locked --format-version 1 \
  | grep -o '"manifest_path":"[^"]*/etcd-client-[^"/]*/Cargo.toml"' | cut -d '"' -f 4 | xargs dirname
PROTOS_TO ?= tools

etcd-protos: ## Writes the descriptors of etcd-client's .proto files, after a change of its version.
	mkdir -p $(PROTOS_TO)
	folder=$$($(ETCD_CLIENT)); \
	(cd "$$folder" && find proto -name '*.proto' | LC_ALL=C sort | xargs cksum) >$(PROTOS_TO)/etcd-client.sums; \
	STRANDLINE_ETCD_PROTOS="$$folder/proto" STRANDLINE_ETCD_SET=$(abspath $(PROTOS_TO))/etcd-client.fds \
	  $(CARGO) check --locked --package strandline-proto

crash-test: ## Kills a broker KILLS times (200) under load, and a quarter as often under the client; no acknowledged record may be lost.
	STRANDLINE_KILLS=$(KILLS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 crash:: crash_client::

failover: ## Kills one of three brokers KILLS times (200) under load; prints how long clients waited.
	STRANDLINE_KILLS=$(KILLS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 cluster::failover

outage: ## Stops all of etcd for SECONDS (600) while clients write to and read from three brokers.
	tests/fetch-etcd >/dev/null
	STRANDLINE_ETCD_OUTAGE_SECONDS=$(SECONDS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 \
	  cluster::outage::records_are_appended_and_read_during_an_etcd_outage

chaos: ## Runs three brokers and etcd in network namespaces (as root) under faults of every kind for MINUTES (10); ONLY=text,text selects kinds by name.
	tests/fetch-etcd >/dev/null
	STRANDLINE_CHAOS_MINUTES=$(MINUTES) STRANDLINE_CHAOS_ONLY="$(ONLY)" $(CARGO) test --locked --test it -- --nocapture --test-threads 1 cluster::chaos

# A separate build: with this flag, tokio's random choices follow from a seed. The released binary is built without the flag.
SIM = CARGO_TARGET_DIR=target/sim RUSTFLAGS="--cfg tokio_unstable" \
  $(CARGO) test --locked --profile sim --package strandline-sim -- --nocapture --test-threads 1

sim: ## Simulates SEEDS runs (200) of one broker and of three under faults, from SEED (1) on, some seeds twice, and planted defects.
	STRANDLINE_SEEDS=$(SEEDS) STRANDLINE_SEED=$(SEED) STRANDLINE_TRACE=$(TRACE) STRANDLINE_LOG=$(LOG) $(SIM) $(ONLY)

sim-fixed: ## Simulates the first 40 seeds of each, some twice, and planted defects; part of `make check`.
	$(MAKE) sim SEEDS=40 SEED=1 ONLY= TRACE= LOG=

sim-new: ## Simulates new seeds for SIM_SECONDS (180) and prints them.
	STRANDLINE_SIM_SECONDS=$(SIM_SECONDS) $(SIM) brokers_keep broker_keeps

mutants: ## Plants each rare defect and simulates seeds until one finds it; takes minutes. MUTANT=name selects one.
	STRANDLINE_MUTANT=$(MUTANT) $(SIM) --ignored every_rare_broken_rule_is_found

model: ## Checks replication in every order of events, up to STATES (2000000) states for each search; ONLY=text selects searches by name.
	STRANDLINE_MODEL_STATES=$(STATES) STRANDLINE_MODEL_ONLY="$(ONLY)" \
	  $(CARGO) test --locked --release --lib -- --ignored --nocapture --test-threads 1 many_faults_in_any_order_violate_no_rule

bench: ## Runs the benchmarks of record, log and tier paths.
	$(CARGO) bench --locked --bench paths

hostile: ## Runs every attack of tests/it/hostile at full size against an optimised broker with 512 MiB and 1,000 partitions; ONLY=text selects memory attacks by name.
	STRANDLINE_HOSTILE_FULL=1 STRANDLINE_HOSTILE_ONLY="$(ONLY)" $(CARGO) test --locked --release --test it -- --nocapture --test-threads 1 hostile::

streams: ## Measures the append latency (p99) beside 10,000 fetch streams and beside ten.
	$(CARGO) test --locked --release --test it ten_thousand_streams -- --ignored --nocapture

# libFuzzer needs unstable compiler flags. RUSTC_BOOTSTRAP enables them in the pinned compiler, so no second toolchain is needed.
fuzz: $(FUZZ) ## Runs every fuzz target for FUZZ_SECONDS (60) each, starting with its seeds and its regressions.
	RUSTC_BOOTSTRAP=1 $(FUZZ) build
	for target in fuzz/fuzz_targets/*.rs; do \
	  name=$$(basename $$target .rs); \
	  mkdir -p fuzz/corpus/$$name fuzz/regressions/$$name; \
	  echo "fuzz: $$name for $(FUZZ_SECONDS) s"; \
	  RUSTC_BOOTSTRAP=1 $(FUZZ) run $$name fuzz/corpus/$$name fuzz/seeds/$$name fuzz/regressions/$$name -- \
	    -max_total_time=$(FUZZ_SECONDS); \
	done

fuzz-seeds: ## Writes missing seeds of fuzz targets; existing seeds stay unchanged.
	$(CARGO) test --locked --test it -- --ignored write_missing_seeds

$(FUZZ):
	$(CARGO) install --locked --debug --version $(FUZZ_VERSION) --root target/tools --target-dir target/tools/build cargo-fuzz
	rm -rf target/tools/build

golden: ## Writes the golden batch of a codec that has none; existing files stay unchanged.
	$(CARGO) test --locked --lib -- --ignored write_missing_golden_files

kafka-reader: ## Runs Kafka's DumpLogSegments on batches of every codec and on data directories; KAFKA_DUMP=path of a script that runs it.
	KAFKA_DUMP=$${KAFKA_DUMP:?set it to the script that runs DumpLogSegments} \
	  $(CARGO) test --locked --test it -- --ignored --nocapture --test-threads 1 kafkas_own_reader

real-s3: ## Tests the doctor and the clean-up of abandoned uploads on a real object store: S3_URL=s3://bucket/prefix, AWS_ENDPOINT_URL, keys.
	S3_URL=$${S3_URL:?set it to a bucket and a prefix, as s3://bucket/prefix} \
	  $(CARGO) test --locked --test it -- --ignored --nocapture real_store

write-docs: ## Writes the generated pages of docs/; tests compare them with the code.
	STRANDLINE_WRITE_DOCS=1 $(CARGO) test --locked --lib documentation_matches
