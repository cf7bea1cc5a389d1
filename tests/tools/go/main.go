// Command gotool is what the tests use of Go: a registrant compiled from the frozen contract, and
// Go's own resolver pointed at one server.
//
//	gotool register|unregister SERVER NAMESPACE SERVICE ADDRESS [NAME=PORT ...]
//	gotool stream SERVER COUNT NAMESPACE SERVICE [NAME=PORT ...]
//	gotool lookup udp|tcp SERVER host|srv|addr NAME
//	gotool names
//	gotool balance TARGET CALLS ADDRESS:PORT ...
//
// stream registers COUNT addresses on one stream without waiting for answers, then removes them
// on the same stream. Everything on stdout is JSON, one value per answer, but for names.
// names and balance are in pod.go.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"gangplank.test/tools/contract"
)

// answer is what both kinds of response say.
type answer struct {
	Address string           `json:"address"`
	Ports   map[string]int32 `json:"ports"`
	Status  uint32           `json:"status"`
	Details string           `json:"details"`
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gotool:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 5 && args[0] == "lookup":
		return lookup(ctx, args[1], args[2], args[3], args[4])
	case len(args) == 1 && args[0] == "names":
		return names(ctx, os.Stdin)
	case len(args) >= 4 && args[0] == "balance":
		return balance(ctx, args[1], args[2], args[3:])
	case len(args) >= 5 && (args[0] == "register" || args[0] == "unregister"):
		return unary(ctx, args[0], args[1], args[2:])
	case len(args) >= 5 && args[0] == "stream":
		return stream(ctx, args[1], args[2:])
	default:
		return errors.New("usage: register|unregister|stream|lookup|names|balance, see main.go")
	}
}

// lookup asks through net.Resolver, in Go's own code, at one server only.
func lookup(ctx context.Context, network, server, kind, name string) error {
	resolver := &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, network, server)
		},
	}
	var found any
	var err error
	switch kind {
	case "host":
		found, err = resolver.LookupHost(ctx, name)
	case "srv":
		_, found, err = resolver.LookupSRV(ctx, "", "", name)
	case "addr":
		found, err = resolver.LookupAddr(ctx, name)
	default:
		return fmt.Errorf("lookup of %q: want host, srv or addr", kind)
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		found = map[string]any{"error": dns.Err, "notFound": dns.IsNotFound, "timeout": dns.IsTimeout}
	} else if err != nil {
		return err
	}
	return print(found)
}

func unary(ctx context.Context, command, server string, args []string) error {
	client, closeConn, err := dial(server)
	if err != nil {
		return err
	}
	defer closeConn()
	ports, err := ports(args[3:])
	if err != nil {
		return err
	}
	info := &contract.ServiceInfo{Namespace: args[0], ServiceName: args[1], Ipaddress: args[2], Ports: ports, Weight: 1}
	call := client.Register
	if command == "unregister" {
		call = client.UnRegister
	}
	result, err := call(ctx, info)
	if err != nil {
		return err
	}
	return print(answer{result.Ipaddress, named(result.Ports), result.Status, result.StatusDetails})
}

func stream(ctx context.Context, server string, args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	ports, err := ports(args[3:])
	if err != nil {
		return err
	}
	client, closeConn, err := dial(server)
	if err != nil {
		return err
	}
	defer closeConn()
	events, err := client.RegistrationEvent(ctx)
	if err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		sent <- send(events, count, args[1], args[2], ports)
	}()
	for {
		response, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return <-sent
		} else if err != nil {
			return err
		}
		if err := print(answer{response.Ipaddress, named(response.Ports), response.Status, response.StatusDetails}); err != nil {
			return err
		}
	}
}

func send(events grpc.BidiStreamingClient[contract.RegistrationMsg, contract.RegistrationResponse],
	count int, namespace, service string, ports []*contract.NamedPort) error {
	for _, kind := range []contract.RegistrationType{contract.RegistrationType_REGISTER, contract.RegistrationType_UNREGISTER} {
		for n := range count {
			err := events.Send(&contract.RegistrationMsg{
				Type:        kind,
				Namespace:   namespace,
				ServiceName: service,
				Ipaddress:   fmt.Sprintf("10.%d.%d.%d", n>>16&255, n>>8&255, n&255),
				Ports:       ports,
				Weight:      1,
			})
			if err != nil {
				return err
			}
		}
	}
	return events.CloseSend()
}

func dial(server string) (contract.ServiceRegistryClient, func(), error) {
	conn, err := grpc.NewClient(server, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return contract.NewServiceRegistryClient(conn), func() { _ = conn.Close() }, nil
}

func ports(args []string) ([]*contract.NamedPort, error) {
	var ports []*contract.NamedPort
	for _, arg := range args {
		name, number, _ := strings.Cut(arg, "=")
		port, err := strconv.ParseInt(number, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("port %q: want NAME=PORT", arg)
		}
		ports = append(ports, &contract.NamedPort{Name: name, Port: int32(port)})
	}
	return ports, nil
}

func named(ports []*contract.NamedPort) map[string]int32 {
	named := make(map[string]int32)
	for _, port := range ports {
		named[port.Name] = port.Port
	}
	return named
}

func print(value any) error {
	return json.NewEncoder(os.Stdout).Encode(value)
}
