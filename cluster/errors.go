package cluster

import (
	"errors"
	"fmt"
	"strings"

	"mailproxy/config"
	"mailproxy/db"
)

// What a command refuses, or could not do. cmd/pmgcm has a remedy for each.
var (
	// ErrNoCluster: the node is a single one.
	ErrNoCluster = errors.New("no cluster defined")
	// ErrClusterExists: create or join on a node that is in a cluster.
	ErrClusterExists = errors.New("cluster already defined")
	// ErrWasMember: create on a node whose keys are those of a cluster that has, or had, other nodes: its database was made anew.
	ErrWasMember = errors.New("this node's keys are those of a cluster with other nodes")
	// ErrOtherJoin: an unfinished join to another place stands in the way.
	ErrOtherJoin = errors.New("another join was begun here and is not finished")
	// ErrNotMaster: only the master does this. The error carries the master where it is known: see NotMasterError.
	ErrNotMaster = errors.New("this node is not the master")
	// ErrAlreadyMaster: promote on the master.
	ErrAlreadyMaster = errors.New("this node is already master")
	// ErrLocalMaster: sync --master_ip on the master (PMG's words).
	ErrLocalMaster = errors.New("local node is master - nothing to do")
	// ErrNoMajority: too few members gave their promise. Nothing but promises was written. See NoMajorityError.
	ErrNoMajority = errors.New("no majority")
	// ErrNotLetIn: members that have proven who they are do not take this node for one. It was deleted.
	ErrNotLetIn = errors.New("this node was deleted, other nodes do not let it in")
	// ErrNotPromotable: the node's row says that it shall not become master.
	ErrNotPromotable = errors.New("this node is not marked promotable")
	// ErrJoining: the node has not been pushed to yet and has no vote.
	ErrJoining = errors.New("this node has not finished joining")
	// ErrNoSuchNode: no member has that CID.
	ErrNoSuchNode = errors.New("no such node")
	// ErrDeleteSelf: delete of the node that it runs on.
	ErrDeleteSelf = errors.New("unable to delete master node")
	// ErrUnwell: a node in no cluster has problems that keep it from making or entering one; beside ErrNoCluster.
	ErrUnwell = errors.New("something is wrong with this node")
	// ErrMasterLeaves: leave on the master.
	ErrMasterLeaves = errors.New("the master cannot leave its cluster")
	// ErrNotConfirmed: the operator did not say yes.
	ErrNotConfirmed = errors.New("not confirmed, nothing changed")
	// ErrNoDaemon: the local daemon does not answer, and without it no peer is in reach.
	ErrNoDaemon = errors.New("the local daemon is not running")
	// ErrDaemonSilent: it runs and does not answer.
	ErrDaemonSilent = errors.New("the local daemon does not answer")
	// ErrNoDatabase: the local PostgreSQL does not answer.
	ErrNoDatabase = errors.New("the local PostgreSQL is not reachable")
	// ErrNotMember: an address that belongs to no member.
	ErrNotMember = errors.New("no member of this cluster has that address")
	// ErrHostNotMaster: sync --master_ip with a node that is not master.
	ErrHostNotMaster = errors.New("host is not cluster master")
	// ErrPeerUnreachable: a peer that is needed does not answer.
	ErrPeerUnreachable = errors.New("peer not reachable")
	// ErrNotInSync: asked, and not in sync; exit code 3.
	ErrNotInSync = errors.New("not in sync")
	// ErrWouldOverwrite: a plain sync on a slave that has rows or commits of its own.
	ErrWouldOverwrite = errors.New("this node has what the master does not have")
	// ErrMasterAway: a command could not be carried to the master. See MasterAwayError.
	ErrMasterAway = errors.New("configuration cannot be changed now")
	// ErrMasterAnswers: a pull from another slave while the master is there.
	ErrMasterAnswers = errors.New("the master answers, its configuration counts")
	// ErrEntryClosed: the journal's entry was applied or dropped before.
	ErrEntryClosed = errors.New("this journal entry was dealt with already")
	// ErrNotEntered: a journal entry of which nothing can be entered again: rows of the cluster itself, secrets.
	ErrNotEntered = errors.New("nothing of this journal entry can be entered again")
	// ErrRefused: the master does not take a change; its words follow.
	ErrRefused = errors.New("refused by the master")
	// ErrCAInUse: ca retire of one that nodes still need.
	ErrCAInUse = errors.New("the CA is in use")
	// ErrNoSuchCA: no CA has that fingerprint.
	ErrNoSuchCA = errors.New("no such CA")
	// ErrNoDataKey: the master cannot open the secrets, and so can neither let a node in nor out.
	ErrNoDataKey = errors.New("the master cannot open the secrets")
	// ErrNoSuchEntry: the journal has no entry of that number.
	ErrNoSuchEntry = errors.New("no such journal entry")

	// ErrTargetNotMaster: join to a node that is not the master.
	ErrTargetNotMaster = errors.New("the node there is not the master")
	// ErrTokenUnknown: the master does not know the token.
	ErrTokenUnknown = errors.New("token unknown")
	// ErrTokenUsed: the token was used by another key.
	ErrTokenUsed = errors.New("token already used")
	// ErrTokenExpired: the token is too old.
	ErrTokenExpired = errors.New("token expired")
	// ErrWrongPassword: it is not root's on the master, or root may not log in there.
	ErrWrongPassword = errors.New("wrong password")
	// ErrPasswordsOff: the setting join_password is no.
	ErrPasswordsOff = errors.New("this cluster takes no passwords")
	// ErrPasswordUnchecked: mailproxy-pam does not answer on the master.
	ErrPasswordUnchecked = errors.New("the master cannot check passwords")
	// ErrManyPasswords: there were too many wrong passwords, from here or in all.
	ErrManyPasswords = errors.New("too many wrong passwords")
	// ErrKeyRevoked: the joining node's key is that of a deleted node.
	ErrKeyRevoked = errors.New("this node's key belongs to a deleted node")
	// ErrNameTaken: another member has that name.
	ErrNameTaken = errors.New("node name already in use")
	// ErrAddressTaken: another member has that address.
	ErrAddressTaken = errors.New("node address already in use")
	// ErrGhost: the same machine and state directory is a member under another key.
	ErrGhost = errors.New("this machine is known as another node")
	// ErrOlderVersion: the joining node's schema is older than the master's, which would not push to it.
	ErrOlderVersion = errors.New("this node's version is older than the master's")
	// ErrBadRequest: what the joining node said of itself is not usable.
	ErrBadRequest = errors.New("join request refused")
	// ErrMasterAlone: a join to a master that holds no lease.
	ErrMasterAlone = errors.New("the master takes no configuration now, and so no node")
	// ErrTooManyJoins: the master was asked too often from here.
	ErrTooManyJoins = errors.New("too many join attempts from this address")
	// ErrJoinFailed: the master could not carry the join out.
	ErrJoinFailed = errors.New("the master could not take this node in")
	// ErrKeyNotConfirmed: the operator did not say yes to the key at the address.
	ErrKeyNotConfirmed = errors.New("the master's key was not confirmed, nothing changed")
	// ErrFingerprint: the key at the address is not the expected one.
	ErrFingerprint = errors.New("fingerprint does not match")
	// ErrJoinUnreachable: nothing answers at the address.
	ErrJoinUnreachable = errors.New("master not reachable")
	// ErrNoFirstPush: the node is a member, but the master's push has not come through.
	ErrNoFirstPush = errors.New("the master's configuration has not arrived")
)

// withDataKey makes the refusal of a master's database, that it cannot open the secrets, one that every node knows.
func withDataKey(err error) error {
	if errors.Is(err, db.ErrNoDataKey) {
		return fmt.Errorf("%w: %w", ErrNoDataKey, err)
	}
	return err
}

// A NotMasterError says who is the master, as far as this node knows.
type NotMasterError struct {
	// Master is the zero Node where it is not known.
	Master config.Node
	// Away says that it does not answer.
	Away bool
}

func (e *NotMasterError) Error() string {
	if e.Master.CID == 0 {
		return ErrNotMaster.Error()
	}
	s := fmt.Sprintf("%v, %s at %s is", ErrNotMaster, label(e.Master), hostOf(e.Master.Address))
	if e.Away {
		s += ", and does not answer"
	}
	return s
}

// Is makes it an ErrNotMaster.
func (e *NotMasterError) Is(target error) bool { return target == ErrNotMaster }

// A NoMajorityError says what a promote lacked, and what a forced one may lose.
type NoMajorityError struct {
	// Votes is how many members gave their promise, of Voters that have a vote; Wanted would do.
	Votes, Voters, Wanted int
	// Missing are the members that did not.
	Missing []string
	// AtRisk are lines for the operator: what a forced promote may lose.
	AtRisk []string
	// Alone says that none of several other members answered: it is this node that is cut off, most likely.
	Alone bool
}

func (e *NoMajorityError) Error() string {
	s := fmt.Sprintf("%v: %d of %d members gave their promise, %d wanted", ErrNoMajority, e.Votes, e.Voters, e.Wanted)
	if len(e.Missing) > 0 {
		s += " (missing: " + strings.Join(e.Missing, ", ") + ")"
	}
	for _, r := range e.AtRisk {
		s += "\n  " + r
	}
	return s
}

// Is makes it an ErrNoMajority.
func (e *NoMajorityError) Is(target error) bool { return target == ErrNoMajority }
