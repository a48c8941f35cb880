-- Leaving a cluster: the node keeps what it has, and is a single one.

-- +goose Up
-- leave ends the membership in the cluster of that id. The rows that make a cluster go, all others stay, with the serial and the history,
-- so that a later cluster of this node goes on counting from there. The same again changes nothing.
-- +goose StatementBegin
CREATE FUNCTION node.leave(id text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position; t text;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF p.cluster_id = '' AND p.cid = 0 THEN
        RETURN;
    END IF;
    IF p.cluster_id <> id THEN
        RAISE EXCEPTION 'this node is in cluster % as CID %', p.cluster_id, p.cid USING ERRCODE = 'MP009';
    END IF;
    PERFORM node.begin_apply();
    FOREACH t IN ARRAY ARRAY['cluster', 'node', 'ca', 'revoked', 'token', 'epoch'] LOOP
        EXECUTE format('DELETE FROM config.%I', t);
    END LOOP;
    DELETE FROM node.lease;
    DELETE FROM node.heartbeat;
    UPDATE node.position SET cid = 0, cluster_id = '', epoch_n = 0, epoch_owner = 0, promised_n = 0, promised_owner = 0, pushed_at = NULL,
        rewrites = rewrites + 1, apply_xid = NULL, apply_at = NULL, applied_digest = NULL, lease_waived = false;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd
