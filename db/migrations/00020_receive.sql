-- What mail is received by, beside domains and networks.

-- +goose Up
-- The recipients of domains that have a list of them. A domain without rows has none, and its next hop is asked.
CREATE TABLE config.recipient (
    domain text,
    local  text, -- in lower case, without quoting; * is everyone
    PRIMARY KEY (domain, local)
);

-- What TLS shows to clients that ask for a name, or for one below *.NAME.
CREATE TABLE config.certificate (
    name  text PRIMARY KEY,
    chain text NOT NULL, -- PEM: the certificate, then those between it and the root
    key   text NOT NULL  -- secret:NAME, the private key in PEM
);

-- Domains whose mail is taken by TLS only.
CREATE TABLE config.tls_sender (
    domain  text PRIMARY KEY,
    comment text NOT NULL DEFAULT ''
);
