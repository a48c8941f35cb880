-- Schemas and tables. Rules for a table in config.*: it has a primary key and no other unique constraint, no foreign key, no
-- serial column and no default that differs between nodes; a column that holds a secret says so in its comment ("secret: ...").
-- Such a table is guarded, digested, pushed and recorded with nothing further (see node.attach).

-- +goose Up
CREATE SCHEMA IF NOT EXISTS node; -- this node's alone
CREATE SCHEMA config;             -- the master's, the same everywhere
CREATE SCHEMA mail;               -- of the node where it happened, read by all

-- Who this node is, how far its configuration is, and what it has promised: one row, locked by whoever commits, applies or promises.
CREATE TABLE node.position (
    only_row       boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    cid            integer NOT NULL DEFAULT 0,
    cluster_id     text    NOT NULL DEFAULT '',
    epoch_n        bigint  NOT NULL DEFAULT 0,
    epoch_owner    integer NOT NULL DEFAULT 0,
    serial         bigint  NOT NULL DEFAULT 0,
    promised_n     bigint  NOT NULL DEFAULT 0,
    promised_owner integer NOT NULL DEFAULT 0,
    pushed_at      timestamptz,              -- the last push that was applied or found nothing to do
    rewrites       bigint  NOT NULL DEFAULT 0, -- counts changes of rows that config.change does not list
    commit_xid     xid8,                     -- the transaction that took serial ...
    commit_at      timestamptz,              -- ... and its start, for a transaction number may come again after a restore
    apply_xid      xid8,                     -- the transaction that may write although this node is a slave
    apply_at       timestamptz,
    attached       bigint  NOT NULL DEFAULT 0, -- the migration that node.attach last ran after
    CHECK ((promised_n, promised_owner) >= (epoch_n, epoch_owner))
);
INSERT INTO node.position DEFAULT VALUES;

-- Per table of config: the number of rows and the sums of the four lanes of their SHA-256. Kept by triggers.
CREATE TABLE node.digest (
    tab text COLLATE "C" PRIMARY KEY,
    n bigint NOT NULL DEFAULT 0,
    a numeric NOT NULL DEFAULT 0, b numeric NOT NULL DEFAULT 0, c numeric NOT NULL DEFAULT 0, d numeric NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- Own commits that the master's history lacks.
CREATE TABLE node.journal (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    epoch_n      bigint NOT NULL,
    epoch_owner  integer NOT NULL,
    serial       bigint NOT NULL,
    at           timestamptz NOT NULL,
    who          text NOT NULL,
    node         integer NOT NULL,
    command      text NOT NULL,
    set_aside_at timestamptz NOT NULL DEFAULT now(),
    by_n         bigint NOT NULL,
    by_owner     integer NOT NULL
);
CREATE TABLE node.journal_change (
    id  bigint REFERENCES node.journal ON DELETE CASCADE,
    seq bigint,
    tab text NOT NULL,
    op  text NOT NULL,
    key jsonb NOT NULL,
    old jsonb,
    new jsonb,
    PRIMARY KEY (id, seq)
);

-- When each other node was last heard, and how far it said it was.
CREATE TABLE node.heartbeat (
    cid         integer PRIMARY KEY,
    heard_at    timestamptz NOT NULL,
    epoch_n     bigint NOT NULL,
    epoch_owner integer NOT NULL,
    serial      bigint NOT NULL
);

CREATE TABLE config.cluster (
    cluster_id text PRIMARY KEY, -- one row, none on a single node
    created_at timestamptz NOT NULL
);

CREATE TABLE config.node (
    cid        integer PRIMARY KEY CHECK (cid > 0),
    uuid       text NOT NULL DEFAULT '',
    name       text NOT NULL,
    address    text NOT NULL,
    public_key text NOT NULL,
    machine_id text NOT NULL DEFAULT '',
    services   text[] NOT NULL DEFAULT '{}',
    promotable boolean NOT NULL DEFAULT true,
    joined_at  timestamptz NOT NULL
);

CREATE TABLE config.ca (
    fingerprint text PRIMARY KEY,
    public_key  text NOT NULL,
    cid         integer NOT NULL,
    created_at  timestamptz NOT NULL
);

CREATE TABLE config.revoked (
    cid        integer PRIMARY KEY,
    name       text NOT NULL,
    public_key text NOT NULL,
    revoked_at timestamptz NOT NULL
);

CREATE TABLE config.setting (
    name  text PRIMARY KEY,
    value text NOT NULL
);

CREATE TABLE config.network (
    prefix  cidr PRIMARY KEY,
    comment text NOT NULL DEFAULT ''
);

CREATE TABLE config.transport (
    name  text PRIMARY KEY,
    hosts text[] NOT NULL DEFAULT '{}',
    tls   text NOT NULL DEFAULT ''
);

CREATE TABLE config.domain (
    name      text PRIMARY KEY,
    transport text NOT NULL DEFAULT '',
    hosts     text[] NOT NULL DEFAULT '{}',
    comment   text NOT NULL DEFAULT ''
);

-- One-time join tokens: the SHA-256 of each, never the token.
CREATE TABLE config.token (
    hash       bytea PRIMARY KEY,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    used_by    text, -- public key of the node that took it
    used_at    timestamptz
);

CREATE TABLE config.secret (
    name  text PRIMARY KEY,
    value bytea NOT NULL
);
COMMENT ON COLUMN config.secret.value IS 'secret: never in history, shown as secret:NAME';

-- The reigns, and the serial with which each began. Never trimmed: it tells whose commits are orphans.
CREATE TABLE config.epoch (
    n            bigint,
    owner        integer,
    first_serial bigint NOT NULL,
    at           timestamptz NOT NULL,
    PRIMARY KEY (n, owner)
);

-- One row a configuration commit.
CREATE TABLE config.history (
    serial      bigint,
    epoch_n     bigint,
    epoch_owner integer,
    at          timestamptz NOT NULL,
    who         text NOT NULL,
    node        integer NOT NULL,
    command     text NOT NULL,
    PRIMARY KEY (serial, epoch_n, epoch_owner)
);

-- The rows that each commit changed, in the order of the statements.
CREATE TABLE config.change (
    serial      bigint,
    epoch_n     bigint,
    epoch_owner integer,
    seq         bigint,
    tab         text NOT NULL COLLATE "C",
    op          text NOT NULL CHECK (op IN ('insert', 'update', 'delete')),
    key         jsonb NOT NULL, -- the primary key's columns
    old         jsonb,
    new         jsonb,
    PRIMARY KEY (serial, epoch_n, epoch_owner, seq)
);
