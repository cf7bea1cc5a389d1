package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
)

// names reads names, one a line, and prints for each what Go's own resolver finds with this
// machine's resolv.conf: the addresses, separated by spaces, or the error.
func names(ctx context.Context, input io.Reader) error {
	resolver := &net.Resolver{PreferGo: true}
	lines := bufio.NewScanner(input)
	for lines.Scan() {
		found, err := resolver.LookupHost(ctx, lines.Text())
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		fmt.Println(strings.Join(found, " "))
	}
	return lines.Err()
}

// balance calls a service that these backends give, by a gRPC client that finds them itself and
// takes them in turn, and prints how many calls each got.
func balance(ctx context.Context, target, calls string, backends []string) error {
	count, err := strconv.Atoi(calls)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	defer server.Stop()
	served := make(chan error, len(backends))
	for _, backend := range backends {
		listener, err := net.Listen("tcp", backend)
		if err != nil {
			return err
		}
		go func() { served <- server.Serve(listener) }()
	}
	client, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		return err
	}
	defer client.Close()
	// Until each has had a call, the client is still connecting: those calls do not count.
	counts := map[string]int{}
	for first := true; ; first = false {
		for range count {
			var from peer.Peer
			check := grpc_health_v1.NewHealthClient(client)
			_, err := check.Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true), grpc.Peer(&from))
			if err != nil {
				return err
			}
			counts[from.Addr.String()]++
		}
		if !first && len(counts) == len(backends) {
			return print(counts)
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(err, fmt.Errorf("called: %v", counts))
		}
		clear(counts)
	}
}
