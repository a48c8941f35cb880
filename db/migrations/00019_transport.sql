-- What a transport may have besides hosts and TLS. Columns that are NULL are not in the digest: nodes of the version before are in sync as
-- long as none of these is used.

-- +goose Up
ALTER TABLE config.transport
    ADD COLUMN host_order text, -- given (NULL), round-robin
    ADD COLUMN username   text, -- whom we log in as
    ADD COLUMN password   text, -- secret:NAME, which is no secret itself
    ADD COLUMN tell       text; -- how the hop is told who our client is: xclient, proxy
