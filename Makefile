# mailproxy: build, check, show, install. See README.md.

SHELL := /bin/bash
export PATH := $(PATH):/usr/local/go/bin:/usr/lib/go/bin

# The commit goes in below; asking git again fails where root builds another user's clone.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

VERSION ?= 0.1
COMMIT  := $(shell git -c safe.directory='*' describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)
LDFLAGS := -s -w -X mailproxy/internal/version.Version=$(VERSION) -X mailproxy/internal/version.Commit=$(COMMIT)

DESTDIR ?=
PREFIX  ?= /usr/local
BIN     := $(DESTDIR)$(PREFIX)/bin
MAN     := $(DESTDIR)$(PREFIX)/share/man
COMPLETION := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
UNITS   := $(DESTDIR)/etc/systemd/system
LIBEXEC := $(DESTDIR)$(PREFIX)/libexec

GOLANGCI_VERSION := v2.15.0
# The one that is installed, if it is that version; else our own in bin/.
GOLANGCI := $(shell golangci-lint version 2>/dev/null | grep -qF ' $(GOLANGCI_VERSION:v%=%) ' && command -v golangci-lint || echo bin/golangci-lint)

# Tests become other users, fill a small file system, and start real servers: as root.
ROOT := $(shell [ "$$(id -u)" -eq 0 ] || echo 'sudo env "PATH=$$PATH" "GOFLAGS=$$GOFLAGS"')

.PHONY: build lab test e2e chaos crash fuzz race lint bench demo man man-check install clean

build:
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/mailproxy ./cmd/pmgcm

# The one program in C, and the one that root runs: it asks PAM for root's password. Only it needs a C compiler.
PAM_HELPER := bin/mailproxy-pam
$(PAM_HELPER): cmd/mailproxy-pam/main.c
	scripts/deps pam
	mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 -Wall -Wextra -Werror -fPIE -pie -fstack-protector-strong -D_FORTIFY_SOURCE=2 -Wl,-z,relro,-z,now -o $@ $< -lpam

# What scripts/lab runs.
lab:
	CGO_ENABLED=0 go build -trimpath -o bin/ ./test/lab/lab

# The model of promote to its larger bounds, then everything with the race detector. That needs cgo and a PostgreSQL server's programs:
# installed if they are not there.
test:
	scripts/deps build test
	$(ROOT) env MODEL=deep go test -run '^TestModel' ./cluster
	$(ROOT) go test -race -timeout 15m ./...

# Stories of a cluster in a lab (test/lab, test/e2e/scenario_test.go): some minutes.
e2e:
	scripts/deps build test
	$(ROOT) go test -race -count=1 -timeout 30m -tags lab -run '^TestScenario' ./test/e2e

# A cluster that is broken at random, judged by test/history. CHAOS_TIME is how long (2m), CHAOS_SEED repeats an order of faults.
chaos: build
	scripts/deps lab
	CGO_ENABLED=0 go build -trimpath -o bin/ ./test/chaos
	$(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CHAOS_TIME,CHAOS_SEED,CHAOS_NODES) bin/chaos

# A node that is killed at random moments under mail: nothing that was answered with 250 is lost. CRASH_TIME is how long (2m),
# CRASH_SEED repeats an order of faults.
crash: build
	scripts/deps lab
	CGO_ENABLED=0 go build -trimpath -o bin/ ./test/crash
	$(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CRASH_TIME,CRASH_SEED) bin/crash

# Every parser of what comes from elsewhere is given whatever a fuzzer finds, FUZZ_TIME each.
FUZZ_TIME ?= 30s
fuzz:
	@set -e; for file in $$(grep -rlE '^func Fuzz' --include='*_test.go' .); do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(f .*/\1/p' $$file); do \
			echo "$$name of $$(dirname $$file)"; \
			go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ_TIME) $$(dirname $$file); \
		done; \
	done

# The packages in which much happens at once, again and again.
race:
	scripts/deps build test
	$(ROOT) go test -race -timeout 30m -count=5 ./cluster ./tunnel ./spool ./queue ./relay ./smtpd

lint: $(GOLANGCI) man-check
	$(GOLANGCI) run --allow-parallel-runners ./...
	$(GOLANGCI) fmt --diff
	@for script in $$(grep -slE '^#!.*bash' scripts/* .ci/*) scripts/completion.bash; do bash -n $$script || exit 1; done

bin/golangci-lint:
	GOBIN=$(CURDIR)/bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)

# Figures beside those of Postfix and HAProxy; JSON=FILE writes them as JSON lines too.
bench: build
	scripts/bench

# A cluster of three nodes on this machine, with real mail.
demo:
	@scripts/demo

# The man pages, from the commands' own definitions and the text in man/*.in.
man: build
	bin/pmgcm man man/pmgcm.1.in >man/pmgcm.1
	bin/mailproxy man man/mailproxy.8.in >man/mailproxy.8

man-check: build
	@for page in pmgcm.1 mailproxy.8; do \
		bin/$${page%.*} man man/$$page.in | diff -u man/$$page - || { echo "man/$$page is out of date: run make man" >&2; exit 1; }; \
	done

install: build $(PAM_HELPER)
	install -d $(BIN) $(LIBEXEC) $(MAN)/man1 $(MAN)/man8 $(COMPLETION) $(UNITS) $(DESTDIR)/etc/pam.d
	install -m 755 bin/mailproxy bin/pmgcm $(BIN)
	install -m 755 $(PAM_HELPER) $(LIBEXEC)
	[ -e $(DESTDIR)/etc/pam.d/mailproxy ] || install -m 644 systemd/mailproxy.pam $(DESTDIR)/etc/pam.d/mailproxy
	install -m 644 man/pmgcm.1 $(MAN)/man1
	install -m 644 man/mailproxy.8 $(MAN)/man8
	for name in mailproxy pmgcm; do sed "s/@NAME@/$$name/g" scripts/completion.bash >$(COMPLETION)/$$name; done
	for unit in mailproxy.service mailproxy-pam.socket mailproxy-pam@.service; do \
		sed 's|@BIN@|$(PREFIX)/bin|g; s|@LIBEXEC@|$(PREFIX)/libexec|g' systemd/$$unit >$(UNITS)/$$unit; \
	done
	@if [ -z '$(DESTDIR)' ]; then \
		getent passwd mailproxy >/dev/null || \
			useradd --system --home-dir /var/lib/mailproxy --no-create-home --shell /usr/sbin/nologin --user-group mailproxy; \
		install -d -m 755 /etc/mailproxy; \
		[ ! -d /run/systemd/system ] || systemctl daemon-reload; \
	fi

clean:
	rm -rf bin
