# `make test` is what a change must pass, `make check` what CI asks. Both fetch what they need.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

CARGO ?= cargo
DENY_VERSION := 0.20.2
DENY := target/tools/bin/cargo-deny

FUZZ_VERSION := 0.13.1
FUZZ := target/tools/bin/cargo-fuzz
FUZZ_SECONDS ?= 60

# How often `make crash-test` kills the broker. STRANDLINE_SEED repeats a run's choices.
KILLS ?= 200

# How long `make chaos` goes on.
MINUTES ?= 10

# How long etcd is gone in `make outage`.
SECONDS ?= 600

# What `make sim` runs: so many seeds from the first on; with TRACE=1 each one's trace, with TRACE=live as it comes, with
# LOG=strandline=debug the brokers' log in it. How long `make sim-new` goes on.
SEEDS ?= 200
SEED ?= 1
TRACE ?=
LOG ?=
SIM_SECONDS ?= 180

# Which broken rules `make mutants` looks for: a part of their name.
MUTANT ?=

# How many states `make model` visits in each search.
STATES ?= 2000000

# Which searches of `make model`, which tests of `make sim`: a part of their name.
ONLY ?=

.PHONY: build release test check fmt clippy client docs deny hostile crash-test failover outage chaos sim sim-fixed sim-new mutants model bench streams fuzz fuzz-seeds golden protos etcd-protos kafka-reader real-s3 write-docs help

help: ## These lines.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: ## The binary, quickly built.
	$(CARGO) build --locked

release: ## The binary as it is meant to run: target/release/strandline.
	$(CARGO) build --locked --release

test: ## Every test, those with real processes too.
	tests/fetch-etcd >/dev/null
	$(CARGO) test --locked --no-fail-fast

check: fmt clippy client docs deny protos test sim-fixed sim-new ## What CI asks: everything below, then the tests.

fmt: ## The sources are formatted.
	$(CARGO) fmt --check

# The simulator and what is only there for it come second. Both packages together have the dependencies of the first call, feature by
# feature, so none is checked twice.
clippy: ## No warning anywhere.
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace --lib --test sim -- -D warnings

client: ## The Rust client alone compiles without the server's crates; a test holds its dependency tree.
	$(CARGO) clippy --locked --no-default-features --lib -- -D warnings

docs: ## The documentation builds without a broken link.
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

deny: $(DENY) ## Licences, duplicates and sources of all dependencies.
	$(DENY) --workspace check bans licenses sources

# Unoptimised on purpose: it runs for seconds, and building it optimised takes minutes.
$(DENY):
	CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install --locked --debug --version $(DENY_VERSION) --root target/tools \
	  --target-dir target/tools/build cargo-deny
	rm -rf target/tools/build

protos: ## What tools/protoc says of etcd-client's files is what they say.
	$(MAKE) --no-print-directory etcd-protos PROTOS_TO=target/tools/protos
	for file in etcd-client.fds etcd-client.sums; do cmp tools/$$file target/tools/protos/$$file; done

# Where cargo has unpacked etcd-client.
ETCD_CLIENT = $(CARGO) metadata --locked --format-version 1 \
  | grep -o '"manifest_path":"[^"]*/etcd-client-[^"/]*/Cargo.toml"' | cut -d '"' -f 4 | xargs dirname
PROTOS_TO ?= tools

etcd-protos: ## Writes what tools/protoc says anew: after a change of etcd-client's version.
	mkdir -p $(PROTOS_TO)
	folder=$$($(ETCD_CLIENT)); \
	(cd "$$folder" && find proto -name '*.proto' | LC_ALL=C sort | xargs cksum) >$(PROTOS_TO)/etcd-client.sums; \
	STRANDLINE_ETCD_PROTOS="$$folder/proto" STRANDLINE_ETCD_SET=$(PROTOS_TO)/etcd-client.fds \
	  $(CARGO) check --locked --no-default-features --lib

crash-test: ## Kills a broker KILLS times (200) under load, and a quarter as often under the client; nothing may be lost.
	STRANDLINE_KILLS=$(KILLS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 crash:: crash_client::

failover: ## Kills one of three brokers KILLS times (200) under load; says how long clients waited.
	STRANDLINE_KILLS=$(KILLS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 cluster::failover

outage: ## Takes all of etcd away from three brokers for SECONDS (600), while records go in and out of each.
	tests/fetch-etcd >/dev/null
	STRANDLINE_ETCD_GONE_SECONDS=$(SECONDS) $(CARGO) test --locked --test it -- --nocapture --test-threads 1 \
	  cluster::outage::records_are_taken_and_read_while_etcd_is_gone

chaos: ## Three brokers and etcd on machines of their own (network namespaces; as root) under faults of every kind, for MINUTES (10); ONLY=text,text picks kinds by their words.
	tests/fetch-etcd >/dev/null
	STRANDLINE_CHAOS_MINUTES=$(MINUTES) STRANDLINE_CHAOS_ONLY="$(ONLY)" $(CARGO) test --locked --test it -- --nocapture --test-threads 1 cluster::chaos

# A build of its own: only with that flag tokio's own choices follow from a seed. What is built is not what is released.
SIM = CARGO_TARGET_DIR=target/sim RUSTFLAGS="--cfg tokio_unstable" \
  $(CARGO) test --locked --profile sim --package strandline-sim -- --nocapture --test-threads 1

sim: ## Simulates SEEDS runs (200) of one broker and of three under faults, from SEED (1) on, some of them twice, and broken rules.
	STRANDLINE_SEEDS=$(SEEDS) STRANDLINE_SEED=$(SEED) STRANDLINE_TRACE=$(TRACE) STRANDLINE_LOG=$(LOG) $(SIM) $(ONLY)

sim-fixed: ## The first 40 seeds of each, some of them twice, and broken rules: what every build simulates.
	$(MAKE) sim SEEDS=40 SEED=1 ONLY= TRACE= LOG=

sim-new: ## Seeds that nobody has run before, for SIM_SECONDS (180); they are printed.
	STRANDLINE_SIM_SECONDS=$(SIM_SECONDS) $(SIM) brokers_keep broker_keeps

mutants: ## Breaks each rare rule on purpose and simulates seeds until one finds it: an hour. MUTANT=name picks one.
	STRANDLINE_MUTANT=$(MUTANT) $(SIM) --ignored every_rare_broken_rule_is_found

model: ## Replication in every order of events, up to STATES (2000000) states for each search; ONLY=text picks searches by name.
	STRANDLINE_MODEL_STATES=$(STATES) STRANDLINE_MODEL_ONLY="$(ONLY)" \
	  $(CARGO) test --locked --release --lib -- --ignored --nocapture --test-threads 1 a_large_search_finds_nothing

bench: ## The benchmarks of record, log and tier paths.
	$(CARGO) bench --locked --bench paths

hostile: ## Every attack of tests/it/hostile in full, against an optimised broker with 512 MiB and 1,000 partitions; ONLY=text picks attacks on memory by their words.
	STRANDLINE_HOSTILE_FULL=1 STRANDLINE_HOSTILE_ONLY="$(ONLY)" $(CARGO) test --locked --release --test it -- --nocapture --test-threads 1 hostile::

streams: ## What 10,000 fetch streams cost those who append: p99 beside ten streams.
	$(CARGO) test --locked --release --test it ten_thousand_streams -- --ignored --nocapture

# libFuzzer wants unstable flags of the compiler. The pinned one takes them when asked, so no second toolchain is needed.
fuzz: $(FUZZ) ## Every fuzz target for FUZZ_SECONDS (60) each, beginning with its seeds and its known cases.
	RUSTC_BOOTSTRAP=1 $(FUZZ) build
	for target in fuzz/fuzz_targets/*.rs; do \
	  name=$$(basename $$target .rs); \
	  mkdir -p fuzz/corpus/$$name fuzz/regressions/$$name; \
	  echo "fuzz: $$name for $(FUZZ_SECONDS) s"; \
	  RUSTC_BOOTSTRAP=1 $(FUZZ) run $$name fuzz/corpus/$$name fuzz/seeds/$$name fuzz/regressions/$$name -- \
	    -max_total_time=$(FUZZ_SECONDS); \
	done

fuzz-seeds: ## Writes the seeds of fuzz targets that have none of that name yet; existing ones are never touched.
	$(CARGO) test --locked --test it -- --ignored write_missing_seeds

$(FUZZ):
	$(CARGO) install --locked --debug --version $(FUZZ_VERSION) --root target/tools --target-dir target/tools/build cargo-fuzz
	rm -rf target/tools/build

golden: ## Writes the golden batch of a codec that has none yet; existing ones are never touched.
	$(CARGO) test --locked --lib -- --ignored write_missing_golden_files

kafka-reader: ## Kafka's own DumpLogSegments on batches of every codec and on whole data directories; KAFKA_DUMP=/path/to/a/script that runs it.
	KAFKA_DUMP=$${KAFKA_DUMP:?names the script that runs DumpLogSegments} \
	  $(CARGO) test --locked --test it -- --ignored --nocapture --test-threads 1 kafkas_own_reader

real-s3: ## The doctor and the end of abandoned uploads on a real store: S3_URL=s3://bucket/prefix, AWS_ENDPOINT_URL, keys.
	S3_URL=$${S3_URL:?names a bucket and a prefix, as s3://bucket/prefix} \
	  $(CARGO) test --locked --test it -- --ignored --nocapture a_real_store

write-docs: ## Writes the generated pages of docs/ anew; tests hold them against the code.
	STRANDLINE_WRITE_DOCS=1 $(CARGO) test --locked --lib the_documentation_is
